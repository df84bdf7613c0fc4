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

    def runs(self, setting: Setting, arm: str, read_out: str) -> ArmRuns | None:
        """An arm's runs; None without a seed that all of its grid points have."""
        losses: dict[GridPoint, dict[int, float]] = defaultdict(dict)
        for member in self._members.get((setting, arm), []):
            point = (member.settings.optimizer.lr, member.settings.optimizer.b1)
            losses[point][member.settings.seed] = member.result.final_losses.get(read_out, math.inf)
        runs = ArmRuns(losses)
        return runs if losses and runs.seeds else None

    def steps_of_loss(self, task: str, schedule: str, baseline: str, read_out: str) -> StepsOfLoss | None:
        """The baseline's losses at all of its lengths, over the seeds that all of them have.

        Returns:
            None with fewer than two lengths, or without such a seed: other seeds have other losses at any length.
        """
        by_length: dict[int, dict[int, float]] = {}
        for setting in self.settings():
            runs = self.runs(setting, baseline, read_out)
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
        runs = self.runs(setting, arm, read_out)
        base_setting = Setting(setting.task, schedule, setting.num_steps)
        base = self.runs(base_setting, baseline, baseline_read_out)
        if runs is None or base is None:
            return None
        tuned, base_tuned = runs.tuned(), base.tuned()
        seeds = sorted(tuned.keys() & base_tuned.keys())
        if not seeds:
            return None
        differences = [tuned[seed] - base_tuned[seed] for seed in seeds]
        curve = self.steps_of_loss(setting.task, schedule, baseline, baseline_read_out)
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


def _is_edge(best: GridPoint, points: Iterable[GridPoint]) -> bool:
    all_points = list(points)
    for axis in (0, 1):
        values = sorted({point[axis] for point in all_points})
        if len(values) > 1 and best[axis] in (values[0], values[-1]):
            return True
    return False
