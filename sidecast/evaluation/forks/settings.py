"""One run at a constant learning rate, the steps at which it is judged, and the decays that end there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from sidecast.errors import ConfigError
from sidecast.evaluation.schedules import Schedule
from sidecast.evaluation.settings import FORMAT, MemberSettings
from sidecast.policies.read_outs import ReadOut, read_out_of

SHAPES = {"linear": "wsd", "1-sqrt": "wsd-sqrt"}
"""Decays by name, and the schedules that end in them."""
DECAY_FRACTIONS = (0.1, 0.2, 0.4)
CHECKPOINTS = (0.25, 0.5, 0.75, 1.0)
ANYTIME = ("ema2", "ema5", "ema10", "ema20")
"""Read-outs that need no knowledge of where the run will be judged."""
FROM_A_STEP = (("wsm", 0.6), ("wsm", 0.8), ("mean", 0.8), ("mean", 0.9))
"""Those that begin at a share of the steps at which it is."""
INTERVAL_STEPS = 10
"""Between two states in a read-out."""
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Decay:
    """A fall of the learning rate to nothing.

    Attributes:
        shape: One of ``SHAPES``.
        fraction: The part of the steps so far, at their end, over which it falls.
    """

    shape: str
    fraction: float

    @property
    def name(self) -> str:
        """In tables."""
        return f"{self.shape} {100 * self.fraction:g} %"

    def schedule(self, warmup_steps: int) -> Schedule:
        """Of a whole run that ends in it."""
        return Schedule(kind=SHAPES[self.shape], warmup_steps=warmup_steps, decay_fraction=self.fraction, min_ratio=0.0)

    def start(self, step: int) -> int:
        """Steps at the constant rate before one that ends at ``step``."""
        return step - max(1, round(self.fraction * step))


@dataclass(frozen=True, kw_only=True)
class ForkSettings:
    """A run and what becomes of it.

    Attributes:
        member: The run, at a constant rate.
        fractions: Lengths of decays, each in every shape.

    Raises:
        ConfigError: A decay would begin in the warm-up.
    """

    member: MemberSettings
    fractions: tuple[float, ...] = DECAY_FRACTIONS

    def __post_init__(self) -> None:
        warmup_steps = self.member.schedule.warmup_steps
        for step in self.checkpoints:
            for decay in self.decays:
                decay.schedule(warmup_steps)
                if decay.start(step) < max(1, warmup_steps):
                    raise ConfigError(
                        f"a decay over {100 * decay.fraction:g} % of {step} steps begins after {decay.start(step)}; "
                        f"allowed: after the warm-up of {warmup_steps} steps"
                    )

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps at which it is judged."""
        return tuple(round(share * self.member.num_steps) for share in CHECKPOINTS)

    @property
    def decays(self) -> tuple[Decay, ...]:
        """All that end at each of them."""
        return tuple(Decay(shape=shape, fraction=fraction) for fraction in self.fractions for shape in SHAPES)

    def read_outs(self, step: int) -> dict[str, ReadOut]:
        """By name in tables, those that are judged at a step."""
        found = {name: read_out_of(name) for name in ANYTIME}
        for kind, share in FROM_A_STEP:
            start = round(share * step) // INTERVAL_STEPS * INTERVAL_STEPS
            found[f"{kind}@{100 * share:g}%"] = read_out_of(f"{kind}@{start}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"member": self.member.to_json(), "fractions": list(self.fractions)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ForkSettings:
        """What ``to_json`` gave."""
        return cls(member=MemberSettings.from_json(values["member"]), fractions=tuple(values["fractions"]))

    def key(self, task_digest: str) -> str:
        """A name for the result; see ``MemberSettings.key``."""
        values = [VERSION, FORMAT, self.member.key(task_digest), [asdict(decay) for decay in self.decays]]
        values.append([list(self.read_outs(step)) for step in self.checkpoints])
        return hashlib.blake2b(json.dumps(values).encode(), digest_size=12).hexdigest()
