"""How much of a decay's gain read-outs have.

The decay is the yardstick, so it is tuned: learning rate, b1, shape and length, anew for every seed by the mean
held-out loss of all *other* seeds. The read-out is one of the very run that this decay was forked from, and is chosen
by the loss on the probe alone, as with a service.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from sidecast.evaluation.analysis import GridPoint, Interval, interval
from sidecast.evaluation.forks.results import ForkResult
from sidecast.evaluation.forks.run import Losses
from sidecast.evaluation.forks.settings import ANYTIME, SHAPES, ForkSettings
from sidecast.evaluation.read_outs import RAW

KINDS = ("any time", "known step")
"""Read-outs among which is chosen: those that need no step, or all."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One seed at one step.

    Attributes:
        point: Learning rate and b1 that the other seeds choose for the decay.
        decay: Its name.
        raw_loss: Held out, without either.
        decay_loss: With the decay.
        chosen: By kind, the read-out with the lowest loss on the probe.
        read_out_losses: By kind, its held-out loss.
        own_losses: By kind, that at the point which the other seeds choose for read-outs.
    """

    point: GridPoint
    decay: str
    raw_loss: float
    decay_loss: float
    chosen: Mapping[str, str]
    read_out_losses: Mapping[str, float]
    own_losses: Mapping[str, float]

    @property
    def has_gain(self) -> bool:
        """Whether the decay ends lower; not where either has diverged."""
        return self.decay_loss < self.raw_loss < math.inf

    def share(self, kind: str) -> float:
        """Of the decay's gain, if there is one."""
        return (self.raw_loss - self.read_out_losses[kind]) / (self.raw_loss - self.decay_loss)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What runs must share to be compared."""

    task: str
    num_steps: int
    warmup_steps: int
    fractions: tuple[float, ...]
    optimizer: str
    """All that is set of it but the learning rate and b1, as JSON."""

    @classmethod
    def of(cls, settings: ForkSettings) -> Setting:
        """What a run has of it."""
        member = settings.member
        optimizer = {name: value for name, value in asdict(member.optimizer).items() if name not in ("lr", "b1")}
        return cls(
            task=member.task,
            num_steps=member.num_steps,
            warmup_steps=member.schedule.warmup_steps,
            fractions=tuple(settings.fractions),
            optimizer=json.dumps(optimizer, sort_keys=True),
        )


Runs = Mapping[GridPoint, Mapping[int, Mapping[str, Losses]]]
"""Losses of one step by grid point, seed and name."""


def by_setting(results: Iterable[ForkResult]) -> dict[Setting, dict[int, Runs]]:
    """Losses by setting and step, with the seeds that all grid points have."""
    found: dict[Setting, dict[int, dict[GridPoint, dict[int, Mapping[str, Losses]]]]] = {}
    for result in results:
        member = result.settings.member
        setting = Setting.of(result.settings)
        for step, losses in result.losses.items():
            points = found.setdefault(setting, {}).setdefault(step, defaultdict(dict))
            points[member.optimizer.lr, member.optimizer.b1][member.seed] = losses
    return {
        setting: {step: _whole(points) for step, points in sorted(steps.items())} for setting, steps in found.items()
    }


def _whole(points: Runs) -> Runs:
    seeds = set.intersection(*(set(runs) for runs in points.values()))
    return {point: {seed: runs[seed] for seed in sorted(seeds)} for point, runs in points.items()}


def judge(runs: Runs) -> dict[int, Judged]:
    """Every seed at one step; empty with fewer than two that all grid points have: others choose for each."""
    seeds = list(next(iter(runs.values())))
    if len(seeds) < 2:
        return {}
    return {seed: _judged(runs, seed, [other for other in seeds if other != seed]) for seed in seeds}


def _judged(runs: Runs, seed: int, others: Sequence[int]) -> Judged:
    decays = [name for name in next(iter(runs.values()))[seed] if _is_decay(name)]

    def read_out(point: GridPoint, seed: int, kind: str) -> str:
        losses = runs[point][seed]
        names = [name for name in losses if not _is_decay(name) and (kind == KINDS[1] or name in (RAW, *ANYTIME))]
        return min(names, key=lambda name: losses[name][0])

    def chosen_loss(point: GridPoint, seed: int, kind: str) -> float:
        return runs[point][seed][read_out(point, seed, kind)][1]

    _, point, decay = min(
        (fmean(runs[point][other][decay][1] for other in others), point, decay) for point in runs for decay in decays
    )
    own = {
        kind: min((fmean(chosen_loss(each, other, kind) for other in others), each) for each in runs)[1]
        for kind in KINDS
    }
    return Judged(
        point=point,
        decay=decay,
        raw_loss=runs[point][seed][RAW][1],
        decay_loss=runs[point][seed][decay][1],
        chosen={kind: read_out(point, seed, kind) for kind in KINDS},
        read_out_losses={kind: chosen_loss(point, seed, kind) for kind in KINDS},
        own_losses={kind: chosen_loss(own[kind], seed, kind) for kind in KINDS},
    )


def _is_decay(name: str) -> bool:
    return name.partition(" ")[0] in SHAPES


def table(setting: Setting, steps: Mapping[int, Runs]) -> str:
    """Markdown: every step, and the mean of all of them, which is taken for each seed first."""
    judged = {step: judge(runs) for step, runs in steps.items()}
    whole = sorted(set.intersection(*map(set, judged.values())))
    seeds = [seed for seed in whole if all(by_seed[seed].has_gain for by_seed in judged.values())]
    lengths = ", ".join(f"{100 * fraction:g}" for fraction in setting.fractions)
    lines = [
        f"## {setting.task}, {setting.num_steps:,} steps at a constant rate",
        "",
        f"Decays over {lengths} % of the steps, warm-up {setting.warmup_steps} steps, optimizer {setting.optimizer}.",
        "",
        f"{len(seeds)} seeds. Held-out losses. Decays are tuned in rate, b1, shape and length, for each seed by the "
        "others. Read-outs are of the same run, chosen by the loss on the probe: among those that need no step (any "
        "time), or also those that begin at a known share of the steps (known step). Share: of the decay's gain. Last "
        "two columns: loss of the read-out, at the rate and b1 that are best for it, less that of the decay. "
        "Intervals: 95 %, Student's t over seeds."
        + (f" Left out, as their decay gains nothing: {len(whole) - len(seeds)}." if len(seeds) < len(whole) else ""),
        "",
        "| steps | raw | decay | share, any time | share, known step | - decay, any time | - decay, known step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    if not seeds:
        reason = "a decay gains nothing in any seed" if whole else "fewer than two seeds that all rates have"
        return "\n".join([*lines[:4], reason, ""])
    for step, by_seed in judged.items():
        raw, decayed = (fmean(getattr(by_seed[seed], name) for seed in seeds) for name in ("raw_loss", "decay_loss"))
        how = Counter(f"{by_seed[seed].decay}, lr {by_seed[seed].point[0]:g}" for seed in seeds).most_common(1)[0][0]
        shares = [_shown(interval([by_seed[seed].share(kind) for seed in seeds]), 100, " %") for kind in KINDS]
        names = [Counter(by_seed[seed].chosen[kind] for seed in seeds).most_common(1)[0][0] for kind in KINDS]
        differences = [
            _shown(interval([by_seed[seed].own_losses[kind] - by_seed[seed].decay_loss for seed in seeds]), 1, "")
            for kind in KINDS
        ]
        cells = [f"{step:,}", f"{raw:.4f}", f"{decayed:.4f} ({how})"]
        cells += [f"{share} ({name})" for share, name in zip(shares, names, strict=True)]
        lines.append(f"| {' | '.join([*cells, *differences])} |")
    means = []
    for kind in KINDS:
        means.append(interval([fmean(judged[step][seed].share(kind) for step in judged) for seed in seeds]))
    lines.append(f"| mean | | | {' | '.join(_shown(mean, 100, ' %') for mean in means)} | | |")
    return "\n".join([*lines, ""])


def _shown(value: Interval, factor: float, unit: str) -> str:
    digits = ".0f" if unit else "+.4f"
    text = f"{factor * value.mean:{digits}}{unit}"
    ends = f" [{factor * value.low:{digits}}, {factor * value.high:{digits}}]"
    return text if math.isinf(value.low) else text + ends
