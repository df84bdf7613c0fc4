"""Trains once straight through and once with a restart in the middle of a probation; writes both runs down."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from tiny_job import new_engine, start_process_group, train

import sidecast
from sidecast.trainer.nowcast.attach import nowcaster_of

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
    nowcaster = nowcaster_of(engine)
    assert nowcaster is not None
    nowcaster.add_listener(lambda event: events.append({"kind": event.kind, "step": event.step, **event.details}))
    return engine


def main(address: str, folder: Path) -> None:
    rank = start_process_group()
    events: dict[str, list[dict[str, Any]]] = {"straight": [], "restarted": []}
    losses: dict[str, list[float]] = {}

    engine = attached(address, events["straight"])
    losses["straight"] = list(islice(train(engine, rank), NUM_STEPS))
    nowcaster_of(engine).close()

    engine = attached(address, events["restarted"])
    losses["restarted"] = list(islice(train(engine, rank), SAVE_STEP))
    engine.save_checkpoint(str(folder / "checkpoints"), tag="middle")
    nowcaster_of(engine).close()

    engine = attached(address, events["restarted"])
    engine.load_checkpoint(str(folder / "checkpoints"), tag="middle")
    rest = train(engine, rank, first_step=SAVE_STEP)
    losses["restarted"] += list(islice(rest, NUM_STEPS - SAVE_STEP))
    nowcaster_of(engine).close()

    if rank == 0:
        (folder / "result.json").write_text(json.dumps({"losses": losses, "events": events}))


if __name__ == "__main__":
    main(sys.argv[-2], Path(sys.argv[-1]))
