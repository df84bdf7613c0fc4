"""One rank of the two hosts' run: trains until it is told to stop, and tells of every step and event, a line each.

Then the same run without a nowcaster, as far as nothing was applied, and a replay of all of it without a service.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import sidecast
from sidecast.trainer.hook.reporting import NowcastEvent
from sidecast.trainer.integrations.deepspeed import hook_of
from tests.hosts.feed import MARK
from tests.integration.workers.tiny_job import new_engine, start_process_group, train

MEASURED_STEPS = 60
FLAG_INTERVAL_STEPS = 10
CONTEXT_LEN = 2


def tell(**what: Any) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(what)}\n")
    sys.stdout.flush()


def interval_steps(rank: int, interval_s: float) -> int:
    """The steps that this machine makes in so many seconds, for all ranks alike."""
    times_s = []
    for _ in zip(range(MEASURED_STEPS), train(new_engine(None), rank), strict=False):
        times_s.append(time.monotonic())
    step_s = statistics.median(after - before for before, after in pairwise(times_s))
    slowest = torch.tensor([step_s], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return max(2 * FLAG_INTERVAL_STEPS, math.ceil(interval_s / float(slowest)))


def is_told_to_stop(folder: Path) -> bool:
    """As rank 0 sees it, so that all ranks see the same."""
    flag = torch.tensor([(folder / "stop").exists()], dtype=torch.int64)
    dist.broadcast(flag, src=0)
    return bool(flag)


def run_live(rank: int, folder: Path, section: dict[str, Any]) -> tuple[list[float], int]:
    """Trains until it is told to stop; returns the losses, and the step of the first application (0: none)."""
    engine = sidecast.attach(new_engine({**section, "record_dir": str(folder / "record")}))
    hook = hook_of(engine)
    assert hook is not None
    first_applied = [0]

    def on_event(event: NowcastEvent) -> None:
        if event.kind == "applied" and not first_applied[0]:
            first_applied[0] = event.step
        tell(rank=rank, kind=event.kind, step=event.step, at_s=time.monotonic(), details=dict(event.details))

    hook.add_listener(on_event)
    losses: list[float] = []
    for loss in train(engine, rank):
        losses.append(loss)
        step = len(losses)
        tell(rank=rank, kind="step", step=step, at_s=time.monotonic())
        if step % FLAG_INTERVAL_STEPS == 0 and is_told_to_stop(folder):
            break
    hook.close()
    return losses, first_applied[0]


def run_again(rank: int, num_steps: int, section: dict[str, Any] | None) -> list[float]:
    engine = new_engine(section)
    hook = None
    if section is not None:
        engine = sidecast.attach(engine)
        hook = hook_of(engine)
    losses = [loss for _, loss in zip(range(num_steps), train(engine, rank), strict=False)]
    if hook is not None:
        hook.close()
    return losses


def main(folder: Path, interval_s: float) -> None:
    rank = start_process_group()
    section = json.loads((folder / "nowcaster.json").read_text())
    steps = interval_steps(rank, interval_s)
    section |= {"context_len": CONTEXT_LEN, "period_steps": CONTEXT_LEN * steps}
    tell(rank=rank, kind="interval", step=0, at_s=time.monotonic(), details={"steps": steps})
    live, first_applied = run_live(rank, folder, section)
    plain = run_again(rank, first_applied, None)
    replay = run_again(rank, len(live), {**section, "replay_dir": str(folder / "record")})
    losses = {"live": live, "plain": plain, "replay": replay}
    (folder / f"losses-{rank}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    # The launcher puts its own options before these.
    main(Path(sys.argv[-2]), float(sys.argv[-1]))
