"""Trains through an outage of the service, then replays that run; tells the test what happens, a JSON line each."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import sidecast
from sidecast.trainer.hook.reporting import NowcastEvent
from sidecast.trainer.integrations.deepspeed import hook_of
from tests.integration.workers.tiny_job import new_engine, start_process_group, train

PERIOD_STEPS = 50
MAX_STEPS = 60_000
STEPS_AFTER = 15
FLAG_INTERVAL_STEPS = 20


def run(rank: int, address: str, folder: Path, mode: str) -> None:
    where = {"live": "record_dir", "replay": "replay_dir"}[mode]
    section = {
        "endpoint": address,
        # So that a prediction is in time on a busy machine, too: what is asked is whether there is one.
        "mode": "sync",
        "period_steps": PERIOD_STEPS,
        "probation_steps": 0,
        where: str(folder / "record"),
    }
    engine = sidecast.attach(new_engine(section))
    nowcaster = hook_of(engine)
    assert nowcaster is not None
    applied: list[int] = []

    def on_event(event: NowcastEvent) -> None:
        if event.kind == "applied":
            applied.append(event.step)
        with (folder / f"{mode}-events{rank}.jsonl").open("a") as stream:
            stream.write(json.dumps({"kind": event.kind, "step": event.step, **event.details}) + "\n")

    nowcaster.add_listener(on_event)
    num_steps = MAX_STEPS if mode == "live" else len(json.loads((folder / "live-losses.json").read_text()))
    losses: list[float] = []
    restarted_at: int | None = None
    for loss in train(engine, rank):
        losses.append(loss)
        step = len(losses)
        if mode == "live" and restarted_at is None and step % FLAG_INTERVAL_STEPS == 0 and is_restarted(folder):
            restarted_at = step
        jumps = [] if restarted_at is None else [item for item in applied if item > restarted_at]
        # All ranks know both numbers alike, so all leave at the same step.
        if step >= num_steps or (jumps and step >= jumps[0] + STEPS_AFTER):
            break
    if rank == 0:
        (folder / f"{mode}-losses.json").write_text(json.dumps(losses))
    nowcaster.close()


def is_restarted(folder: Path) -> bool:
    """Whether the test has restarted the service, as rank 0 sees it, so that all ranks see the same."""
    flag = torch.tensor([(folder / "restarted").exists()], dtype=torch.int64)
    dist.broadcast(flag, src=0)
    return bool(flag)


def main(address: str, folder: Path) -> None:
    rank = start_process_group()
    for mode in ("live", "replay"):
        run(rank, address, folder, mode)
        dist.barrier()


if __name__ == "__main__":
    main(sys.argv[-2], Path(sys.argv[-1]))
