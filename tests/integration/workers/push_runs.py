"""The same training with pushes by a service, by the evaluation's method, with a gain of 0, and without."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sidecast
from sidecast.evaluation.methods.push import PushMethod
from sidecast.manifest import ModelManifest
from sidecast.protos.shards import total_elements
from sidecast.trainer.hook.reporting import NowcastEvent
from sidecast.trainer.integrations.deepspeed import hook_of
from sidecast.trainer.partitions import Partition
from sidecast.trainer.partitions.deepspeed import layout_of
from tests.integration.workers.tiny_job import new_engine, train

INTERVAL_STEPS, TIME_CONSTANT_STEPS, START_STEP = 5, 15.0, 10
NUM_STEPS = 41
# Sums of it have no rounding, in whatever order they are made.
LEARNING_RATE = 2.0**-8


def compare_pushes(rank: int, address: str, folder: Path) -> None:
    """Leaves the losses and final weights of each run, and what the service's run told."""
    for name, push in (("pushed", {"max_relative_norm": None}), ("gain-0", {"gain": 0.0})):
        section = {
            "endpoint": address,
            "policy": "push",
            "mode": "sync",
            "push": {
                "interval_steps": INTERVAL_STEPS,
                "time_constant_steps": TIME_CONSTANT_STEPS,
                "start_step": START_STEP,
                **push,
            },
        }
        _run(rank, folder, name, section, None)
    _run(rank, folder, "evaluated", None, PushMethod)
    _run(rank, folder, "plain", None, None)


def _run(
    rank: int, folder: Path, name: str, section: Mapping[str, Any] | None, method: type[PushMethod] | None
) -> None:
    engine = new_engine(section)
    for group in engine.optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    engine = sidecast.attach(engine)
    hook = hook_of(engine)
    told: list[dict[str, Any]] = []

    def on_event(event: NowcastEvent) -> None:
        told.append({"kind": event.kind, "step": event.step, **event.details})

    if hook is not None:
        hook.add_listener(on_event)
    partition = Partition(lambda: layout_of(engine))
    params_P = torch.empty(total_elements(partition.owned_shards))
    partition.read_owned(params_P)
    pushing = None
    losses = []
    for step, loss in enumerate(islice(train(engine, rank), NUM_STEPS), start=1):
        losses.append(loss)
        if method is not None and step == INTERVAL_STEPS:
            # A service knows the motion from its first snapshot on. Every rank for its own elements: without a cap
            # a push needs no norm, and so nothing of the other ranks.
            partition.read_owned(params_P)
            pushing = method(
                ModelManifest(partition.parameters, {}, {}),
                params_P,
                interval_steps=INTERVAL_STEPS,
                time_constant_steps=TIME_CONSTANT_STEPS,
                start_step=START_STEP,
                late_steps=0,
                guard=False,
                max_relative_norm=None,
            )
        elif pushing is not None:
            partition.read_owned(params_P)
            pushing.after_step(step, params_P, LEARNING_RATE, loss)
            partition.apply(torch.zeros_like(params_P), 0.0, base=params_P)
    partition.read_owned(params_P)
    torch.save(params_P, folder / f"{name}-{rank}.pt")
    (folder / f"{name}-{rank}.json").write_text(json.dumps({"losses": losses, "told": told}))
    if hook is not None:
        hook.close()
    dist.barrier()
