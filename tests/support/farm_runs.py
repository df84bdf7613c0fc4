"""Tiny tasks and texts for tests of the farm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sidecast.evaluation.corpora import Corpus
from sidecast.evaluation.farm import GroupRun
from sidecast.evaluation.gradients import Engine
from sidecast.evaluation.schedules import Schedule
from sidecast.evaluation.settings import MemberSettings, MethodSettings, OptimizerSettings
from sidecast.evaluation.tasks import Task, find_task

TASK = find_task("smoke")


def corpus() -> Corpus:
    """A text with something to learn: each byte depends on the one before."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 3, (6000,), generator=generator)
    tokens = (steps.cumsum(0) % 50).to(torch.uint8)
    return Corpus(tokens[:5000], tokens[5000:], "made up")


def member(
    *,
    seed: int = 0,
    num_steps: int = 30,
    lr: float = 1e-2,
    b1: float = 0.9,
    method: str = "none",
    optimizer: str = "adamw",
    schedule: str = "cosine",
    options: dict[str, Any] | None = None,
) -> MemberSettings:
    """A short run."""
    return MemberSettings(
        task=TASK.name,
        arm=method if optimizer == "adamw" else optimizer,
        seed=seed,
        num_steps=num_steps,
        schedule=Schedule(kind=schedule, warmup_steps=5),
        optimizer=OptimizerSettings(name=optimizer, lr=lr, b1=b1),
        method=MethodSettings(name=method, options=options or {}),
    )


def train(members: list[MemberSettings], task: Task = TASK, **engine: Any) -> GroupRun:
    """A finished group."""
    run = GroupRun(task, [corpus()], members, Engine(**engine))
    run.advance(members[0].num_steps)
    return run


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than such small tensors do."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
