"""What the records of several runs say beside each other, and whether they may be compared: arithmetic, no drawing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sidecast.trainer.job.run_log import Record
from sidecast.trainer.report.comparison import Point, RunCurves, first_crossing, nowcast_cost

# Of the record of a run, what has to be alike for losses to mean the same: its path, and what people call it.
_MEANING = (
    (("num_parameters",), "the number of parameters"),
    (("training", "data", "corpus"), "the corpus"),
    (("training", "data", "tokenizer"), "the tokenizer"),
    (("training", "data", "sequence_length"), "the sequence length"),
    (("training", "data", "validation_sequences"), "the number of sequences that are validated on"),
    (("num_validation_tokens",), "the number of tokens that are held out"),
)
# And for what a run has gained to be owed to its nowcasts.
_TRAINING = (
    (("training", "schedule"), "the schedule of the learning rate"),
    (("deepspeed", "optimizer", "params", "lr"), "the learning rate"),
    (("deepspeed", "optimizer"), "the optimizer"),
    (("training", "steps"), "the length in steps"),
    (("training", "seed"), "the seed"),
    (("deepspeed", "gradient_clipping"), "gradient clipping"),
    (("training", "model"), "the model"),
    (("start_step",), "the step that it began at"),
    (("deepspeed", "bf16"), "the precision (bf16)"),
    (("deepspeed", "fp16"), "the precision (fp16)"),
    (("deepspeed", "torch_autocast"), "the precision (torch_autocast)"),
)


@dataclass(frozen=True)
class NamedRun:
    """One run of a report.

    Attributes:
        name: What the report calls it.
        curves: Its records.
        records: The same, in their order.
    """

    name: str
    curves: RunCurves
    records: tuple[Record, ...]

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens that all ranks together train on in one step; None if the records do not tell."""
        settings = self.curves.run
        try:
            ds_config, data = settings["deepspeed"], settings["training"]["data"]
            return int(
                ds_config["train_micro_batch_size_per_gpu"]
                * ds_config.get("gradient_accumulation_steps", 1)
                * settings["num_ranks"]
                * data["sequence_length"]
            )
        except KeyError:
            return None

    @property
    def seconds_by_step(self) -> dict[float, float]:
        """Seconds of training at the steps of all records that tell."""
        return {item["step"]: item["training_s"] for item in self.records if "training_s" in item and "step" in item}

    @property
    def losses(self) -> tuple[Point, ...]:
        """What the run is judged by: its validations, or, where it has none, its training losses."""
        return self.curves.validation or self.curves.train

    @property
    def read_outs(self) -> dict[str, tuple[Point, ...]]:
        """Losses of read-outs by name, where somebody has written them down as records of the kind ``read_out``."""
        found: dict[str, list[Point]] = {}
        for item in self.records:
            if item["kind"] == "read_out":
                found.setdefault(item["name"], []).append((item["step"], item["loss"]))
        return {name: tuple(sorted(points)) for name, points in found.items()}

    @property
    def has_nowcasts(self) -> bool:
        """Whether the run was nowcasted, if only in vain."""
        return bool(self.curves.events) or nowcast_cost(self.curves) is not None

    @property
    def is_over(self) -> bool:
        """Whether it has come to its end."""
        return self.curves.summary is not None

    def by_tokens(self, points: Sequence[Point]) -> tuple[Point, ...]:
        """Points over tokens instead of steps; empty if the records do not tell."""
        num_tokens = self.tokens_per_step
        return () if num_tokens is None else tuple((step * num_tokens, loss) for step, loss in points)

    def by_time(self, points: Sequence[Point]) -> tuple[Point, ...]:
        """Points over seconds of training instead of steps, where the records tell."""
        seconds = self.seconds_by_step
        return tuple((seconds[step], loss) for step, loss in points if step in seconds)


def reference_of(runs: Sequence[NamedRun]) -> NamedRun:
    """What the others are compared with where nobody says: the first run without nowcasts, or else the first."""
    return next((run for run in runs if not run.has_nowcasts), runs[0])


@dataclass(frozen=True)
class Fairness:
    """What stands against comparing runs.

    Attributes:
        losses: Why losses do not mean the same.
        causes: Why a difference may be owed to something else than nowcasts.
        times: Why seconds do not mean the same.
        limits: What the runs cannot tell, alike as they may be.
    """

    losses: tuple[str, ...]
    causes: tuple[str, ...]
    times: tuple[str, ...]
    limits: tuple[str, ...]

    @property
    def is_fair(self) -> bool:
        """Whether nothing stands against comparing losses, and owing their difference to nowcasts."""
        return not self.losses and not self.causes


def fairness(runs: Sequence[NamedRun], reference: NamedRun) -> Fairness:
    """Looks for what differs between runs besides their nowcasts.

    Args:
        runs: All of them.
        reference: The one that the others are compared with.
    """
    losses: list[str] = []
    causes: list[str] = []
    times: list[str] = []
    for run in runs:
        if not run.curves.run:
            losses.append(f"{run.name} does not say what it trained, on what and how")
        if not run.is_over:
            causes.append(f"{run.name} is not over: its last step so far is {run.curves.train[-1][0]:,}")
    for run in runs:
        if run is reference or not run.curves.run or not reference.curves.run:
            continue
        losses += _differences(run, reference, _MEANING)
        if run.tokens_per_step != reference.tokens_per_step:
            causes.append(
                f"{run.name} trains on {_shown(run.tokens_per_step)} tokens a step, {reference.name} on "
                f"{_shown(reference.tokens_per_step)}: look at losses by tokens"
            )
        causes += _differences(run, reference, _TRAINING[:2])
        causes += _differences(_without_rate(run), _without_rate(reference), _TRAINING[2:])
        for path, what in ((("machine",), "the machine"), (("num_ranks",), "the number of ranks")):
            times += _differences(run, reference, ((path, what),))
    return Fairness(tuple(losses), tuple(causes), tuple(times), tuple(_limits(runs)))


def _limits(runs: Sequence[NamedRun]) -> list[str]:
    seeds = {_at(run.curves.run, ("training", "seed")) for run in runs if run.curves.run}
    limits = []
    if len(runs) > 1:
        limits.append(
            "Nothing here says that a learning rate is the best one for its run, and "
            + ("one seed is no statistic" if len(seeds) < 2 else "so few seeds are no statistic")
            + ": sidecast evaluate tunes both sides over many seeds."
        )
    if any(run.curves.schedule == "constant" for run in runs):
        limits.append(
            "Where the learning rate is constant, a decay often gains more than nowcasting does, and leaves less to "
            "gain."
        )
    return limits


def _without_rate(run: NamedRun) -> NamedRun:
    """The run without the optimizer's learning rate, which is told of by itself."""
    settings = json.loads(json.dumps(dict(run.curves.run)))
    settings.get("deepspeed", {}).get("optimizer", {}).get("params", {}).pop("lr", None)
    return NamedRun(run.name, RunCurves.of([{"kind": "run", **settings}]), ())


def _differences(run: NamedRun, reference: NamedRun, fields: Sequence[tuple[tuple[str, ...], str]]) -> list[str]:
    found = []
    for path, what in fields:
        mine, other = _at(run.curves.run, path), _at(reference.curves.run, path)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            mine, other = (
                {name: one.get(name) for name in {**mine, **other} if mine.get(name) != other.get(name)}
                for one in (mine, other)
            )
        if mine != other:
            found.append(f"{what} of {run.name} is {_shown(mine)}, of {reference.name} {_shown(other)}")
    return found


def _at(record: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = record
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any) -> str:
    if value is None:
        return "not told"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else f"{value}"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run compares with the reference.

    Attributes:
        last_loss: At its last step.
        best_loss: Its lowest.
        best_step: Where that was.
        difference: Its loss minus the reference's at the last step that both have measured; None if there is none.
        at_step: That step.
        equivalent_steps: Steps after which the reference was at this run's best loss; None if it never was, or if that
            says nothing.
        why_not: Why there are none; empty if there are.
    """

    last_loss: float
    best_loss: float
    best_step: float
    difference: float | None
    at_step: float | None
    equivalent_steps: float | None
    why_not: str


def outcome(run: NamedRun, reference: NamedRun) -> Outcome:
    """Compares a run with the reference; with itself, too."""
    best_step, best_loss = min(run.losses, key=lambda point: point[1])
    # A validation is not to be compared with a training loss.
    is_alike = bool(run.curves.validation) == bool(reference.curves.validation)
    others = dict(reference.losses) if is_alike else {}
    common = [(step, loss - others[step]) for step, loss in run.losses if step in others]
    at_step, difference = common[-1] if common and run is not reference else (None, None)
    steps, why_not = None, ""
    if run is reference:
        why_not = "reference"
    elif not is_alike:
        why_not = "only one of them was validated"
    elif run.curves.has_decay or reference.curves.has_decay:
        why_not = "a rate decays: only ends compare"
    else:
        steps = first_crossing(reference.losses, best_loss)
        why_not = "" if steps is not None else f"more than {reference.losses[-1][0]:,}"
    return Outcome(
        last_loss=run.losses[-1][1],
        best_loss=best_loss,
        best_step=best_step,
        difference=difference,
        at_step=at_step,
        equivalent_steps=steps,
        why_not=why_not,
    )
