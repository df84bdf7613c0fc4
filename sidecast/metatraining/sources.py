"""Where trajectories come from: small models, and how they are trained. Held-out tasks are never among them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from sidecast.errors import ConfigError
from sidecast.evaluation.schedules import Schedule
from sidecast.evaluation.settings import FORMAT, MemberSettings, OptimizerSettings
from sidecast.evaluation.tasks import Task

TRAJECTORY_FORMAT = 1
"""Counts changes of what a trajectory's file means."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Some runs of one model on the same data, one for each learning rate.

    Attributes:
        task: The model, its text and batch.
        use: ``training``: nowcasters learn from it; ``validation``: they are judged by it.
        seed: Decides the initial weights and the order of the data.
        lrs: Peak learning rates.
        schedule: ``constant`` or ``cosine``.
        b1: Of AdamW.
        num_steps: Length of the runs.
        snapshot_steps: Steps between two states that are kept.
        warmup_steps: Steps over which the learning rate rises.
    """

    task: Task
    use: Literal["training", "validation"]
    seed: int
    lrs: tuple[float, ...]
    schedule: str
    num_steps: int
    snapshot_steps: int
    b1: float = 0.9
    warmup_steps: int = 50

    def __post_init__(self) -> None:
        if self.task.use != "tuning":
            raise ConfigError(
                f"task {self.task.name!r} is {self.task.use}; nowcasters are trained on tuning tasks only"
            )
        if self.num_steps % self.snapshot_steps:
            raise ConfigError(
                f"snapshot_steps is {self.snapshot_steps}; it must divide the runs' {self.num_steps} steps"
            )

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.use}-{self.task.name}-{self.schedule}-{self.seed}"

    @property
    def num_snapshots(self) -> int:
        """N, states of each run that are kept, the initial one included."""
        return self.num_steps // self.snapshot_steps + 1

    @property
    def num_bytes(self) -> int:
        """What its runs take on disk, in 16 bits an element."""
        return 2 * len(self.lrs) * self.num_snapshots * self.task.model.build().manifest.num_elements

    def members(self) -> list[MemberSettings]:
        """The runs."""
        return [
            MemberSettings(
                task=self.task.name,
                arm="adamw",
                seed=self.seed,
                num_steps=self.num_steps,
                schedule=Schedule(kind=self.schedule, warmup_steps=self.warmup_steps),
                optimizer=OptimizerSettings(lr=lr, b1=self.b1),
            )
            for lr in self.lrs
        ]

    def digest(self, corpus_digest: str) -> str:
        """Equal if and only if the trajectories are the same, up to round-off."""
        values = asdict(self) | {"task": self.task.digest([corpus_digest])}
        text = json.dumps([TRAJECTORY_FORMAT, FORMAT, values], sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
