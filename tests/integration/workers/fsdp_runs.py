"""Two ranks of plain loops with FSDP2, nowcasted by a service; each writes what it saw as JSON.

Usage: python fsdp_runs.py FOLDER ENDPOINT
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import sidecast
from sidecast.errors import ConfigError
from tests.integration.workers.fsdp_models import CASES, Small, batch, build, full_weights, held, load, save, train

NUM_RANKS = 2
PERIOD_STEPS = 20
# In the middle of the probation of the jump of step 20, and of the next window.
SAVE_STEP = 26
NUM_STEPS = 45
PUSH = {"interval_steps": 5, "time_constant_steps": 15.0, "start_step": 10}


def run(
    case: str,
    settings: Mapping[str, Any] | None,
    *,
    num_steps: int = NUM_STEPS,
    save_to: Path | None = None,
    load_from: Path | None = None,
) -> dict[str, Any]:
    """Trains; returns losses, events, and a digest of all that this rank holds and of the whole weights."""
    model, optimizer = build(CASES[case])
    evaluate(model)
    events: list[Any] = []
    if settings is not None:
        model = sidecast.attach(model, optimizer, settings)
        hook: Any = sidecast.hook_of(model)
        hook.add_listener(lambda event: events.append([event.kind, event.step]))
    first = 0
    if load_from is not None:
        load(model, optimizer, load_from)
        evaluate(model)
        sidecast.resume_nowcasting(model, load_from)
        first = SAVE_STEP
    losses = train(model, optimizer, range(first, num_steps), evaluates=CASES[case].evaluates)
    if save_to is not None:
        save(model, optimizer, save_to)
        sidecast.save_nowcasting(model, save_to)
    seen = {"losses": losses, "events": events, "num_losses": 0}
    if settings is not None:
        hook.close()
        seen["num_losses"] = hook.summary()["num_losses"]
    return seen | {"held": digest(held(optimizer)), "weights": digest(full_weights(model))}


def train_apart(settings: Mapping[str, Any], *, few: int) -> dict[str, Any]:
    """Every rank trains a whole model on its own batches, and nobody exchanges gradients."""
    model = Small()
    nn.init.constant_(model.few, few)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.0**-6)
    try:
        sidecast.attach(model, optimizer, settings)
    except ConfigError as error:
        return {"refusal": str(error)}
    events: list[Any] = []
    hook: Any = sidecast.hook_of(model)
    hook.add_listener(lambda event: events.append([event.kind, event.step, event.details.get("reason")]))
    train(model, optimizer, range(NUM_STEPS), evaluates=False)
    hook.close()
    return {"events": events}


def evaluate(model: Any) -> None:
    """As Lightning does before anything else; leaves the root's parameters gathered."""
    with torch.no_grad():
        model(batch(0, 0))


def digest(value: Any) -> str:
    """Of all bits of tensors in lists, dictionaries and pairs."""
    found = hashlib.blake2b(digest_size=16)

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found.update(item.contiguous().view(torch.uint8).numpy().tobytes() if item.dim() else repr(item).encode())
        elif isinstance(item, Mapping):
            for key in sorted(item):
                found.update(key.encode())
                add(item[key])
        elif isinstance(item, list | tuple):
            for each in item:
                add(each)
        else:
            found.update(repr(item).encode())

    add(value)
    return found.hexdigest()


def jump_settings(endpoint: str) -> dict[str, Any]:
    always = {"endpoint": endpoint, "require": True, "mode": "sync"}
    return always | {"period_steps": PERIOD_STEPS, "max_relative_norm": 1e3}


def run_rank(rank: int, folder: Path, endpoint: str) -> None:
    """All runs of one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    jumps = jump_settings(endpoint)
    pushes = {"endpoint": endpoint, "require": True, "mode": "sync", "policy": "push"}
    checkpoint = folder / "checkpoint"
    seen = {
        "plain": run("gathered", None),
        # Snapshots go out, and no push begins before the run is over.
        "nothing": run("gathered", pushes | {"push": PUSH | {"start_step": 10 * NUM_STEPS}}),
        "jumps": run("gathered", jumps),
        "saved": run("gathered", jumps, num_steps=SAVE_STEP, save_to=checkpoint),
        "resumed": run("gathered", jumps, load_from=checkpoint),
        # Of a run that nobody else goes on with: its service keeps what a window needs, and nothing of longer ago.
        "saved for one": run("gathered", jumps, num_steps=SAVE_STEP, save_to=folder / "for-one"),
        "replicas": run("replicas", jumps),
        "pushes": run("bf16", pushes | {"push": PUSH}),
        "without pushes": run("bf16", None),
        "begun apart": train_apart(jumps, few=rank),
        "drifted apart": train_apart(jumps, few=0),
        "drifted apart, pushed": train_apart(pushes | {"push": PUSH}, few=0),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def run_alone(folder: Path, endpoint: str) -> None:
    """One rank goes on from the checkpoint of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-of-one", rank=0, world_size=1)
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sidecast").addHandler(handler)
    seen = run("gathered", jump_settings(endpoint), load_from=folder / "for-one")
    (folder / "alone.json").write_text(json.dumps(seen | {"warnings": warnings}))
    dist.destroy_process_group()


def main(folder: Path, endpoint: str) -> int:
    """Forks the ranks, as importing torch takes longer than all their runs; returns how many have failed."""
    forked = multiprocessing.get_context("fork")
    ranks = [forked.Process(target=run_rank, args=(rank, folder, endpoint)) for rank in range(NUM_RANKS)]
    alone = forked.Process(target=run_alone, args=(folder, endpoint))
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    alone.start()
    alone.join()
    return sum(process.exitcode != 0 for process in (*ranks, alone))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
