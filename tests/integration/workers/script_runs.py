"""Scripts of a kind that users write, on one rank of a DeepSpeed run; writes what they saw as JSON.

Usage: python script_runs.py FOLDER ENDPOINT
"""

from __future__ import annotations

import gc
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn

import sidecast
from sidecast.trainer.integrations.deepspeed import hook_of

PERIOD_STEPS = 20


def new_engine(endpoint: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    nowcaster = {"endpoint": endpoint, "require": True, "mode": "sync", "period_steps": PERIOD_STEPS}
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "nowcaster": nowcaster | {"max_relative_norm": 1e3},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def loss_at(engine: Any, step: int) -> torch.Tensor:
    inputs = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
    loss: torch.Tensor = (engine(inputs) - inputs.square().mean(1, keepdim=True)).square().mean()
    return loss


def torch_style(endpoint: str) -> dict[str, Any]:
    """Calls ``loss.backward()``, and a jump does great harm."""
    engine = sidecast.attach(new_engine(endpoint))
    hook: Any = hook_of(engine)
    events: list[Any] = []
    hook.add_listener(lambda event: events.append([event.kind, event.step]))
    num_steps = PERIOD_STEPS * 3 // 2 + 1
    for step in range(num_steps):
        loss = loss_at(engine, step) + 1000.0 * hook.totals.num_applied
        loss.backward()
        engine.step()
    hook.close()
    return {"events": events, "num_losses": hook.summary()["num_losses"], "num_steps": num_steps}


def num_children() -> int:
    """Living ones, and those that nobody has waited for."""
    return sum(len(path.read_text().split()) for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"))


def held() -> dict[str, int]:
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "children": num_children(),
    }


def once(endpoint: str, end: str) -> dict[str, Any]:
    """Attaches, trains, ends and drops; what is left then."""
    engine = sidecast.attach(new_engine(endpoint))
    engine.backward(loss_at(engine, 0))
    engine.step()
    if end == "closed":
        hook: Any = hook_of(engine)
        hook.close()
        del hook
    # DeepSpeed itself frees no engine that is dropped without this.
    engine.destroy()
    gone = weakref.ref(engine), weakref.ref(engine.module)
    del engine
    for _ in range(3):
        gc.collect()
    return {"is_gone": [each() is None for each in gone], **held()}


def main(folder: Path, endpoint: str) -> None:
    torch.set_num_threads(1)
    # Compiling DeepSpeed's shared-memory operator would take longer than everything else here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    results = {
        "torch_style": torch_style(endpoint),
        "ends": [once(endpoint, end) for end in ("closed", *("closed", "destroyed") * 4)],
    }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
