"""What the results of a farm say: differences between arms over seeds, with intervals, and what they are worth in
steps.

An arm is judged at its best learning rate and b1. They are chosen anew for every seed, by the mean of all *other*
seeds, so that no seed is judged by a choice that it took part in.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from scipy.stats import t as student_t

from sidecast.evaluation.equivalent_steps import StepsOfLoss
from sidecast.evaluation.results import Finished

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and what it is likely to lie between.

    Attributes:
        mean: Over the seeds.
        low: Lower end of the 95 % interval of Student's t; minus infinity with fewer than two seeds.
        high: Upper end.
        num: Seeds.
    """

    mean: float
    low: float
    high: float
    num: int


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and its confidence interval."""
    mean = fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf, len(values))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half, len(values))


GridPoint = tuple[float, float]
"""Learning rate and b1."""


@dataclass(frozen=True)
class ArmRuns:
    """All runs of one arm at one length, under one schedule, on one task, with one read-out.

    Attributes:
        losses: Final loss by grid point and seed.
    """

    losses: Mapping[GridPoint, Mapping[int, float]]

    @property
    def seeds(self) -> list[int]:
        """Seeds that all grid points have."""
        return sorted(set.intersection(*(set(by_seed) for by_seed in self.losses.values())))

    def best(self, seeds: Iterable[int] | None = None) -> GridPoint:
        """The grid point with the lowest mean loss over some seeds; None: over all."""
        chosen = self.seeds if seeds is None else list(seeds)
        return min(self.losses, key=lambda point: (fmean(self.losses[point][seed] for seed in chosen), point))

    def tuned(self) -> dict[int, float]:
        """Each seed's loss at the grid point that the other seeds choose; a single seed has to choose its own."""
        seeds = self.seeds
        chosen = {seed: self.best([other for other in seeds if other != seed] or [seed]) for seed in seeds}
        return {seed: self.losses[point][seed] for seed, point in chosen.items()}


@dataclass(frozen=True, order=True)
class Setting:
    """What runs must share to be compared.

    Attributes:
        task: Name.
        schedule: Kind.
        num_steps: Length.
    """

    task: str
    schedule: str
    num_steps: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm and read-out against the baseline.

    Attributes:
        setting: Where.
        arm: Name.
        read_out: Name.
        best: Grid point that is best over all seeds.
        is_edge: Whether that lies at an end of the grid, so that a wider one might do better.
        loss: Over seeds, each at the point that the others choose.
        difference: To the baseline, paired by seed.
        num_better: Seeds in which the arm is better.
        saved: Share of the steps that the baseline needs more; None where it cannot be read.
        is_saved_bounded: Whether a seed's loss lay outside what the baseline's lengths reach, so that ``saved`` is cut.
        worst_spike: Over seeds, at the best point.
        overhead: Time of the method as a share of that of the steps; median.
    """

    setting: Setting
    arm: str
    read_out: str
    best: GridPoint
    is_edge: bool
    loss: Interval
    difference: Interval
    num_better: int
    saved: Interval | None
    is_saved_bounded: bool
    worst_spike: float
    overhead: float


class Results:
    """All finished members of a farm, sorted for questions.

    Args:
        finished: The members.
    """

    def __init__(self, finished: Iterable[Finished]) -> None:
        self._members: dict[tuple[Setting, str], list[Finished]] = defaultdict(list)
        for member in finished:
            settings = member.settings
            setting = Setting(settings.task, settings.schedule.kind, settings.num_steps)
            self._members[setting, settings.arm].append(member)

    def settings(self) -> list[Setting]:
        """All of them, sorted."""
        return sorted({setting for setting, _ in self._members})

    def arms(self, setting: Setting) -> list[str]:
        """The arms that have runs there, in the order of their first result."""
        return [arm for other, arm in self._members if other == setting]

    def runs(
        self, setting: Setting, arm: str, read_out: str, points: Iterable[GridPoint] | None = None
    ) -> ArmRuns | None:
        """An arm's runs; None without a seed that all of the grid points have.

        Args:
            setting: Where.
            arm: Name.
            read_out: Name.
            points: That are asked for; None: all that the arm has.
        """
        losses: dict[GridPoint, dict[int, float]] = defaultdict(dict)
        for member in self._members.get((setting, arm), []):
            point = (member.settings.optimizer.lr, member.settings.optimizer.b1)
            # What was run before there was a read-out says nothing of it.
            if read_out in member.result.final_losses:
                losses[point][member.settings.seed] = member.result.final_losses[read_out]
        runs = ArmRuns(losses if points is None else {point: losses.get(point, {}) for point in points})
        return runs if runs.losses and runs.seeds else None

    def points(self, setting: Setting, arm: str) -> set[GridPoint]:
        """The grid points of an arm."""
        members = self._members.get((setting, arm), [])
        return {(member.settings.optimizer.lr, member.settings.optimizer.b1) for member in members}

    def gaps(self, setting: Setting, baseline: str) -> list[str]:
        """What comparisons with the baseline leave out, because one side has not run it; a sentence each.

        Args:
            setting: Where.
            baseline: Name of the arm to compare with.
        """
        gaps = []
        base_points = self.points(setting, baseline)
        for arm in self.arms(setting):
            points = self.points(setting, arm)
            for one, other, lacking in ((arm, baseline, base_points - points), (baseline, arm, points - base_points)):
                if lacking:
                    gaps.append(f"{one} was not run at {_named(lacking)}, so that {other} is not judged there")
            runs = {point: self._seeds(setting, arm, point) for point in points & base_points}
            lacking_by_seeds: dict[str, list[str]] = defaultdict(list)
            for seed in sorted(set().union(*runs.values())):
                if lacking := {point for point, seeds in runs.items() if seed not in seeds}:
                    lacking_by_seeds[_named(lacking)].append(f"{seed}")
            for named, seeds in lacking_by_seeds.items():
                gaps.append(f"no use is made of {arm} with seed {', '.join(seeds)}, which was not run at {named}")
        for length in (other for other in self.settings() if other.num_steps != setting.num_steps):
            lacking = base_points - self.points(length, baseline)
            if (length.task, length.schedule) == (setting.task, setting.schedule) and lacking:
                gaps.append(
                    f"no equivalent steps are read from {baseline} of {length.num_steps:,} steps, which was not run at "
                    f"{_named(lacking)}"
                )
        return gaps

    def _seeds(self, setting: Setting, arm: str, point: GridPoint) -> set[int]:
        return {
            member.settings.seed
            for member in self._members[setting, arm]
            if (member.settings.optimizer.lr, member.settings.optimizer.b1) == point
        }

    def steps_of_loss(
        self, task: str, schedule: str, baseline: str, read_out: str, points: Iterable[GridPoint]
    ) -> StepsOfLoss | None:
        """The baseline's losses at its lengths that were tuned alike, over the seeds that all of them have.

        Args:
            task: Name.
            schedule: Kind.
            baseline: Name of the arm.
            read_out: Name.
            points: Of the grid; a length that lacks one of them was tuned less, and would make steps look saved.

        Returns:
            None with fewer than two lengths, or without such a seed: other seeds have other losses at any length.
        """
        points = list(points)
        by_length: dict[int, dict[int, float]] = {}
        for setting in self.settings():
            runs = self.runs(setting, baseline, read_out, points)
            if setting.task == task and setting.schedule == schedule and runs is not None:
                by_length[setting.num_steps] = runs.tuned()
        seeds = set.intersection(*map(set, by_length.values())) if len(by_length) > 1 else set()
        if not seeds:
            return None
        return StepsOfLoss({length: fmean(tuned[seed] for seed in seeds) for length, tuned in by_length.items()})

    def compare(
        self, setting: Setting, arm: str, read_out: str, baseline: str, baseline_read_out: str, schedule: str
    ) -> Row | None:
        """One row of a table.

        Args:
            setting: Of the arm.
            arm: Name.
            read_out: Of the arm.
            baseline: Name of the arm to compare with.
            baseline_read_out: Of the baseline.
            schedule: The baseline's, at the arm's own length.

        Returns:
            The comparison; None if the two share no seed.
        """
        base_setting = Setting(setting.task, schedule, setting.num_steps)
        # An arm that chooses from more points looks better by that alone.
        points = self.points(setting, arm) & self.points(base_setting, baseline)
        runs = self.runs(setting, arm, read_out, points)
        base = self.runs(base_setting, baseline, baseline_read_out, points)
        if runs is None or base is None:
            return None
        tuned, base_tuned = runs.tuned(), base.tuned()
        seeds = sorted(tuned.keys() & base_tuned.keys())
        if not seeds:
            return None
        differences = [tuned[seed] - base_tuned[seed] for seed in seeds]
        curve = self.steps_of_loss(setting.task, schedule, baseline, baseline_read_out, points)
        saved, is_bounded = None, False
        if curve is not None:
            # A seed's luck is in both losses alike: only the difference counts, from the baseline's mean on.
            middle = curve.loss_at(setting.num_steps)
            readings = [curve.steps_for(middle + difference) for difference in differences]
            saved = interval([1.0 - setting.num_steps / reading.steps for reading in readings])
            is_bounded = any(reading.is_bounded for reading in readings)
        best = runs.best()
        at_best = [
            member.result
            for member in self._members[setting, arm]
            if (member.settings.optimizer.lr, member.settings.optimizer.b1) == best
        ]
        return Row(
            setting=setting,
            arm=arm,
            read_out=read_out,
            best=best,
            is_edge=_is_edge(best, runs.losses),
            loss=interval([tuned[seed] for seed in seeds]),
            difference=interval(differences),
            num_better=sum(difference < 0 for difference in differences),
            saved=saved,
            is_saved_bounded=is_bounded,
            worst_spike=max(result.worst_spike for result in at_best),
            overhead=median(result.method_s / result.step_s if result.step_s else 0.0 for result in at_best),
        )


def _named(points: Iterable[GridPoint]) -> str:
    return "; ".join(f"lr {lr:g}, b1 {b1:g}" for lr, b1 in sorted(points))


def _is_edge(best: GridPoint, points: Iterable[GridPoint]) -> bool:
    all_points = list(points)
    for axis in (0, 1):
        values = sorted({point[axis] for point in all_points})
        if len(values) > 1 and best[axis] in (values[0], values[-1]):
            return True
    return False
