"""What two runs' records say about each other: pure arithmetic, no files and no drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sidecast.trainer.job.run_log import Record, is_pushed

Point = tuple[float, float]


@dataclass(frozen=True)
class RunCurves:
    """One run's records, sorted by what they tell.

    Attributes:
        run: The ``run`` record: settings, versions, sizes.
        train: Points of step and training loss.
        validation: Points of step and validation loss.
        applied: The ``nowcast`` records of applied jumps or pushes.
        events: All ``nowcast`` records.
        summary: The ``summary`` record; None if the run has not ended.
        training_s: Seconds of training at the last record.
    """

    run: Record
    train: tuple[Point, ...]
    validation: tuple[Point, ...]
    applied: tuple[Record, ...]
    events: tuple[Record, ...]
    summary: Record | None
    training_s: float

    @classmethod
    def of(cls, records: Iterable[Record]) -> RunCurves:
        by_kind: dict[str, list[Record]] = {}
        for record in records:
            by_kind.setdefault(record["kind"], []).append(record)
        train = by_kind.get("train", [])
        events = by_kind.get("nowcast", [])
        return cls(
            run=by_kind.get("run", [{}])[0],
            train=_points(train),
            validation=_points(by_kind.get("validation", [])),
            applied=tuple(record for record in events if record["event"] == "applied"),
            events=tuple(events),
            summary=by_kind.get("summary", [None])[-1],
            training_s=train[-1]["training_s"] if train else 0.0,
        )

    def num_events(self, event: str) -> int:
        return sum(record["event"] == event for record in self.events)

    @property
    def schedule(self) -> str:
        """Kind of the learning rate's schedule; empty if the records do not tell."""
        kind: str = self.run.get("training", {}).get("schedule", {}).get("kind", "")
        return kind

    @property
    def has_decay(self) -> bool:
        """Whether the learning rate falls to the end, so that losses on the way are no measure of the run."""
        return self.schedule not in ("", "constant")

    @property
    def has_pushes(self) -> bool:
        """Whether nowcasts are pushes, of which no single one is judged."""
        return is_pushed(self.run)

    @property
    def jumps(self) -> tuple[Record, ...]:
        """The records of applied jumps; pushes are none."""
        return () if self.has_pushes else self.applied


@dataclass(frozen=True, kw_only=True)
class NowcastCost:
    """What nowcasting took from a run; of ranks that differ, the one that paid most, and bytes of all ranks.

    Attributes:
        staging_s: Copying shards into shared memory, included in ``blocked_s``.
        blocked_s: All the time in which a rank did the hook's work instead of training.
        blocked_share: ``blocked_s`` over the seconds of training.
        bytes_uploaded: Snapshots sent.
        bytes_fetched: Predictions received.
        nowcast_s: Seconds of each nowcast in the service.
    """

    staging_s: float
    blocked_s: float
    blocked_share: float
    bytes_uploaded: int
    bytes_fetched: int
    nowcast_s: tuple[float, ...]


def nowcast_cost(curves: RunCurves) -> NowcastCost | None:
    """The cost of a finished run's nowcasts; None for a run without a nowcaster."""
    if curves.summary is None or not curves.summary["nowcaster"]:
        return None
    ranks: list[dict[str, Any]] = curves.summary["nowcaster"]
    blocked_s = max(rank.get("blocked_s", 0.0) for rank in ranks)
    return NowcastCost(
        staging_s=max(rank.get("staging_s", 0.0) for rank in ranks),
        blocked_s=blocked_s,
        blocked_share=blocked_s / curves.summary["training_s"],
        bytes_uploaded=sum(rank.get("bytes_uploaded", 0) for rank in ranks),
        bytes_fetched=sum(rank.get("bytes_fetched", 0) for rank in ranks),
        nowcast_s=tuple(ranks[0].get("nowcast_s", ())),
    )


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """What nowcasting saved or cost against a run without, by steps to reach that one's best validation loss.

    Whether that pays is another question: a baseline that is not tuned, or whose learning rate does not decay, leaves
    steps to be saved in cheaper ways.

    Attributes:
        target_loss: The baseline's best validation loss.
        baseline_steps: When the baseline reached it.
        steps: When the run with nowcasts did, interpolated between validations; None if it never did.
        best_loss: The best validation loss of the run with nowcasts.
        behind_steps: If it never did: how long before its own best step the baseline had reached that loss.
        resolution_steps: Steps between validations; less than that is not told apart.
    """

    target_loss: float
    baseline_steps: float
    steps: float | None
    best_loss: float
    behind_steps: float | None
    resolution_steps: float

    @property
    def saved_steps(self) -> float | None:
        return None if self.steps is None else self.baseline_steps - self.steps

    @property
    def has_saved(self) -> bool:
        return self.saved_steps is not None and self.saved_steps >= self.resolution_steps

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        target = f"the baseline's best validation loss ({self.target_loss:.4f}, at step {self.baseline_steps:,.0f})"
        if self.steps is None:
            behind = "" if self.behind_steps is None else f", {self.behind_steps:,.0f} steps behind it"
            return (
                f"No steps saved: the run with nowcasts did not reach {target}. Its own best is {self.best_loss:.4f}"
                f" ({self.best_loss - self.target_loss:+.4f}{behind})."
            )
        saved_steps = self.baseline_steps - self.steps
        share = abs(saved_steps) / self.baseline_steps
        if self.has_saved:
            verdict = f"{saved_steps:,.0f} steps saved against the run without nowcasts ({share:.1%})"
        elif saved_steps <= -self.resolution_steps:
            verdict = f"{-saved_steps:,.0f} steps lost against the run without nowcasts ({share:.1%})"
        else:
            verdict = (
                f"About even: {saved_steps:+,.0f} steps saved, less than the {self.resolution_steps:,.0f} steps "
                "between two validations"
            )
        return f"{verdict}. The run with nowcasts reached {target} at step {self.steps:,.0f}."


@dataclass(frozen=True, kw_only=True)
class EqualBudgetComparison:
    """What nowcasting brought against a run without of the same length and the same decay: the losses at the end.

    Attributes:
        num_steps: Length of both runs.
        loss: Validation loss at the end, with nowcasts.
        baseline_loss: Without.
        schedule: Of both runs' learning rates.
    """

    num_steps: float
    loss: float
    baseline_loss: float
    schedule: str

    @property
    def has_saved(self) -> bool:
        return self.loss < self.baseline_loss

    @property
    def sentence(self) -> str:
        """The verdict in words."""
        difference = self.loss - self.baseline_loss
        word = "lower" if difference < 0 else "higher" if difference > 0 else "no different"
        amount = f"{abs(difference):.4f} {word} than" if difference else f"{word} from that of"
        return (
            f"After {self.num_steps:,.0f} steps the validation loss is {self.loss:.4f}, {amount} the run without "
            f"nowcasts under the same {self.schedule} decay ({self.baseline_loss:.4f})."
        )


def verdict(curves: RunCurves, baseline: RunCurves) -> RunComparison | EqualBudgetComparison | None:
    """Compares two runs; None if either has no validation.

    Where both learning rates fall to the end of runs of one length, only the ends tell: within a run the loss falls by
    the decay, so that steps until some loss is reached say next to nothing. In all other cases it is these steps.
    """
    if not curves.validation or not baseline.validation:
        return None
    (last_step, last_loss), (baseline_last_step, baseline_last_loss) = curves.validation[-1], baseline.validation[-1]
    if curves.has_decay and curves.schedule == baseline.schedule and last_step == baseline_last_step:
        return EqualBudgetComparison(
            num_steps=last_step, loss=last_loss, baseline_loss=baseline_last_loss, schedule=curves.schedule
        )
    baseline_steps, target_loss = min(baseline.validation, key=lambda point: point[1])
    best_step, best_loss = min(curves.validation, key=lambda point: point[1])
    steps = first_crossing(curves.validation, target_loss)
    behind_steps = None
    if steps is None:
        baseline_crossing = first_crossing(baseline.validation, best_loss)
        assert baseline_crossing is not None
        behind_steps = best_step - baseline_crossing
    return RunComparison(
        target_loss=target_loss,
        baseline_steps=baseline_steps,
        steps=steps,
        best_loss=best_loss,
        behind_steps=behind_steps,
        resolution_steps=baseline.validation[-1][0] / len(baseline.validation),
    )


def first_crossing(points: Sequence[Point], level: float) -> float | None:
    """The first step at which a curve is at or below a level, on straight lines between its points."""
    previous: Point | None = None
    for step, loss in points:
        if loss <= level:
            if previous is None:
                return step
            share = (previous[1] - level) / (previous[1] - loss)
            return previous[0] + share * (step - previous[0])
        previous = (step, loss)
    return None


def smoothed(points: Sequence[Point], window: int) -> tuple[Point, ...]:
    """A centred moving average over ``window`` points (fewer at the ends)."""
    half = window // 2
    averaged = []
    for index, (step, _) in enumerate(points):
        reach = min(half, index, len(points) - 1 - index)
        near = points[index - reach : index + reach + 1]
        averaged.append((step, sum(loss for _, loss in near) / len(near)))
    return tuple(averaged)


def first_difference(curves: RunCurves, baseline: RunCurves) -> float | None:
    """The first logged step whose training losses differ in any bit; None if there is none."""
    for (step, loss), (_, baseline_loss) in zip(curves.train, baseline.train, strict=False):
        if loss != baseline_loss:
            return step
    return None


def _points(records: Iterable[Record]) -> tuple[Point, ...]:
    return tuple((record["step"], record["loss"]) for record in records)
