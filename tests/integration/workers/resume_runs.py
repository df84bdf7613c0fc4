"""Trains once straight through and once with a restart in the middle of a probation; writes both runs down."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import sidecast
from sidecast.trainer.integrations.deepspeed import hook_of
from tests.integration.workers.tiny_job import new_engine, pacer_of, train

PERIOD_STEPS = 50
# The jump of step 50 is judged at step 75; the window that ends at step 100 has two of its five states.
SAVE_STEP = 70
NUM_STEPS = 160


def attached(address: str, events: list[dict[str, Any]]) -> Any:
    section = {
        "endpoint": address,
        "require": True,
        "period_steps": PERIOD_STEPS,
        "max_steps": NUM_STEPS,
        # The service's answer then comes at a known step, so that two runs can be compared bit by bit.
        "mode": "sync",
    }
    engine = sidecast.attach(new_engine(section))
    nowcaster = hook_of(engine)
    assert nowcaster is not None
    nowcaster.add_listener(lambda event: events.append({"kind": event.kind, "step": event.step, **event.details}))
    return engine


def train_on(engine: Any, rank: int, first_step: int, num_steps: int) -> list[float]:
    """Trains, but never past a snapshot that is still on its way: its loss would cost a window."""
    pacer = pacer_of(engine)
    losses = []
    for loss in islice(train(engine, rank, first_step), num_steps):
        losses.append(loss)
        pacer.wait()
    return losses


def compare_with_a_resume(rank: int, address: str, folder: Path) -> None:
    """Trains both runs."""
    events: dict[str, list[dict[str, Any]]] = {"straight": [], "restarted": []}
    losses: dict[str, list[float]] = {}

    engine = attached(address, events["straight"])
    losses["straight"] = train_on(engine, rank, 0, NUM_STEPS)
    hook_of(engine).close()

    engine = attached(address, events["restarted"])
    losses["restarted"] = train_on(engine, rank, 0, SAVE_STEP)
    engine.save_checkpoint(str(folder / "checkpoints"), tag="middle")
    hook_of(engine).close()

    engine = attached(address, events["restarted"])
    num_before = len(events["restarted"])
    engine.load_checkpoint(str(folder / "checkpoints"), tag="middle")
    while all(event["kind"] != "connected" for event in events["restarted"][num_before:]):
        hook_of(engine)._inbox.poll(1.0)
    losses["restarted"] += train_on(engine, rank, SAVE_STEP, NUM_STEPS - SAVE_STEP)
    hook_of(engine).close()

    if rank == 0:
        (folder / "resume.json").write_text(json.dumps({"losses": losses, "events": events}))
