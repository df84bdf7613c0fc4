"""Scripts of a kind that users write, on one rank of a DeepSpeed run; writes what they saw as JSON.

Usage: python script_runs.py FOLDER ENDPOINT
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import weakref
from enum import Enum
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sidecast
from sidecast.trainer.integrations.deepspeed import hook_of

PERIOD_STEPS = 20


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))


def section(endpoint: str) -> dict[str, Any]:
    nowcaster = {"endpoint": endpoint, "require": True, "mode": "sync", "period_steps": PERIOD_STEPS}
    return nowcaster | {"max_relative_norm": 1e3}


def new_engine(endpoint: str, **more: Any) -> Any:
    model = new_model()
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "nowcaster": section(endpoint),
        **more,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def new_loop(endpoint: str, *, is_sharded: bool) -> tuple[Any, torch.optim.Optimizer]:
    """A model, whole or sharded by FSDP2, and its optimizer, attached to."""
    model = new_model()
    if is_sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    return sidecast.attach(model, optimizer, section(endpoint)), optimizer


def inputs_at(step: int) -> torch.Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(step))


def loss_at(engine: Any, step: int) -> torch.Tensor:
    inputs = inputs_at(step)
    loss: torch.Tensor = (engine(inputs) - inputs.square().mean(1, keepdim=True)).square().mean()
    return loss


def torch_style(endpoint: str, folder: Path) -> dict[str, Any]:
    """Calls ``loss.backward()``, and a jump does great harm; DeepSpeed's monitor writes to files."""
    monitor = {"enabled": True, "output_path": str(folder), "job_name": "monitor"}
    engine = sidecast.attach(new_engine(endpoint, csv_monitor=monitor))
    hook: Any = hook_of(engine)
    events: list[Any] = []
    hook.add_listener(lambda event: events.append([event.kind, event.step]))
    num_steps = PERIOD_STEPS * 3 // 2 + 1
    for step in range(num_steps):
        loss = loss_at(engine, step) + 1000.0 * hook.totals.num_applied
        loss.backward()
        engine.step()
    hook.close()
    engine.destroy()
    return {"events": events, "num_losses": hook.summary()["num_losses"], "num_steps": num_steps}


def num_children() -> int:
    """Living ones, and those that nobody has waited for."""
    return sum(len(path.read_text().split()) for path in Path(f"/proc/{os.getpid()}/task").glob("*/children"))


def held() -> dict[str, Any]:
    for _ in range(3):
        gc.collect()
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:" in line]
    tensors = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in living(torch.Tensor)}
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "children": num_children(),
        "shared_bytes": sum(map(mapped_bytes, maps)),
        "tensor_bytes": sum(tensors.values()),
        "our_objects": sorted({type(each).__name__ for each in gc.get_objects() if is_ours(each)}),
        "backward_is_of": Path(torch.autograd.backward.__code__.co_filename).name,
    }


def mapped_bytes(line: str) -> int:
    start, stop = line.split()[0].split("-")
    return int(stop, 16) - int(start, 16)


def living(kind: type) -> list[Any]:
    return [each for each in gc.get_objects() if issubclass(type(each), kind)]


def is_ours(thing: Any) -> bool:
    """Whether it belongs to a hook on a run."""
    is_from_there = f"{type(thing).__module__}".startswith(("sidecast.trainer.hook", "sidecast.trainer.integrations"))
    return is_from_there and not issubclass(type(thing), Enum)


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
    left = held()
    return {"is_gone": [each() is None for each in gone], **left}


def once_in_a_loop(endpoint: str, end: str, *, is_sharded: bool) -> dict[str, Any]:
    """The same without an engine."""
    model, optimizer = new_loop(endpoint, is_sharded=is_sharded)
    loss_at(model, 0).backward()
    optimizer.step()
    if end == "closed":
        hook: Any = sidecast.hook_of(model)
        hook.close()
        del hook
    gone = weakref.ref(model), weakref.ref(optimizer)
    del model, optimizer
    left = held()
    return {"is_gone": [each() is None for each in gone], **left}


def without_losses(model: Any, optimizer: Any) -> dict[str, Any]:
    """Trains by gradients of outputs, which say nothing of a loss; optimizer: what makes the steps."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sidecast").addHandler(handler)
    hook: Any = sidecast.hook_of(model)
    for step in range(2 * PERIOD_STEPS + 1):
        outputs = model(inputs_at(step))
        outputs.backward(torch.full_like(outputs, 1e-3))
        optimizer.step()
        model.zero_grad()
    hook.close()
    logging.getLogger("sidecast").removeHandler(handler)
    return {"warnings": told, "num_applied": hook.totals.num_applied, "num_losses": hook.totals.num_losses}


ENDS = ("closed", "dropped") * 5


def main(folder: Path, endpoint: str) -> None:
    torch.set_num_threads(1)
    # Compiling DeepSpeed's shared-memory operator would take longer than everything else here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", verbose=False)
    results = {
        "torch_style": torch_style(endpoint, folder),
        "ends of engines": [once(endpoint, end) for end in ENDS],
        "ends of loops": [once_in_a_loop(endpoint, end, is_sharded=False) for end in ENDS],
        "ends of sharded loops": [once_in_a_loop(endpoint, end, is_sharded=True) for end in ENDS],
        "no losses of an engine": without_losses(*[sidecast.attach(new_engine(endpoint))] * 2),
        "no losses of a loop": without_losses(*new_loop(endpoint, is_sharded=False)),
        "no losses of a sharded loop": without_losses(*new_loop(endpoint, is_sharded=True)),
    }
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
