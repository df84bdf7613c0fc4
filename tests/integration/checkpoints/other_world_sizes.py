"""DeepSpeed jobs that go on with another number of ranks; each first rank writes what it saw as JSON.

Usage: python other_world_sizes.py FOLDER ENDPOINT
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from torch import nn

import sidecast

PERIOD_STEPS = 20
# In the middle of the probation of the jump of step 20, and with one state of the next window behind it.
SAVE_STEP = 26
NUM_STEPS = 45


class Case(NamedTuple):
    """A job, and the numbers of ranks that it is saved and resumed by.

    Attributes:
        settings: Of DeepSpeed.
        saved_by: Ranks.
        resumed_by: Ranks.
    """

    settings: Mapping[str, Any]
    saved_by: int
    resumed_by: int


# DeepSpeed itself repartitions what was made universal; at stage 0 there is nothing to.
UNIVERSAL = {"checkpoint": {"load_universal": True}}
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
CASES = {
    "stage 0": Case({"zero_optimization": {"stage": 0}}, 2, 1),
    "stage 2": Case({"zero_optimization": {"stage": 2}, **UNIVERSAL}, 1, 2),
    "stage 3": Case({"zero_optimization": STAGE_3, **UNIVERSAL}, 2, 1),
}


def new_engine(case: Case, endpoint: str) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    nowcaster = {"endpoint": endpoint, "require": True, "mode": "sync", "period_steps": PERIOD_STEPS}
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 8,
            "zero_allow_untested_optimizer": True,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
            "nowcaster": nowcaster | {"max_relative_norm": 1e3},
            **case.settings,
        },
    )
    return sidecast.attach(engine)


def train(engine: Any, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(2 * step + dist.get_rank())
        inputs = torch.randn(8, 8, generator=generator)
        engine.backward((engine(inputs) - inputs.square().mean(1, keepdim=True)).square().mean())
        engine.step()


def save(case: Case, folder: Path, endpoint: str) -> None:
    engine = new_engine(case, endpoint)
    train(engine, 0, SAVE_STEP)
    engine.save_checkpoint(str(folder), tag="saved")
    engine.destroy()


def resume(case: Case, folder: Path, endpoint: str) -> dict[str, Any]:
    """Goes on from what another number of ranks has saved."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sidecast").addHandler(handler)
    engine = new_engine(case, endpoint)
    hook: Any = sidecast.hook_of(engine)
    run_id = hook.run_id
    events: list[Any] = []
    hook.add_listener(lambda event: events.append([event.kind, event.step]))
    engine.load_checkpoint(str(folder), tag="saved")
    seen = {"step": hook.step, "epoch": hook.epoch, "is_on_probation": hook.is_on_probation}
    seen["is_same_run"] = hook.run_id != run_id
    train(engine, SAVE_STEP, NUM_STEPS)
    engine.destroy()
    logging.getLogger("sidecast").removeHandler(handler)
    return seen | {"events": events, "warnings": warnings}


def run_rank(rank: int, world_size: int, action: str, folder: Path, endpoint: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{world_size}", "LOCAL_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    store = f"file://{folder}/store-{action}-{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    # Compiling DeepSpeed's shared-memory operator would take longer than everything else here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    for name, case in CASES.items():
        if action == "save" and case.saved_by == world_size:
            save(case, folder / name, endpoint)
        elif action == "resume" and case.resumed_by == world_size:
            seen = resume(case, folder / name, endpoint)
            if rank == 0:
                (folder / f"{name}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def convert(folder: Path) -> None:
    """Makes universal checkpoints of all that need to be, in their places, with what is ours beside."""
    torch.set_num_threads(1)
    for saved in folder.glob("stage [23]/saved"):
        original = saved.rename(saved.with_name("original"))
        settings = {"input_folder": str(original), "output_folder": str(saved), "keep_temp_folder": False}
        settings |= {"num_extract_workers": 1, "num_merge_workers": 1, "strict": True, "inject_missing_state": True}
        ds_to_universal.main(argparse.Namespace(**settings))


def main(folder: Path, endpoint: str) -> int:
    """Forks all processes, as importing torch and DeepSpeed takes longer than what they do; how many have failed."""
    forked = multiprocessing.get_context("fork")
    num_failed = 0
    for action in ("save", "convert", "resume"):
        if action == "convert":
            processes = [forked.Process(target=convert, args=(folder,))]
        else:
            ranks = [(rank, world_size) for world_size in (1, 2) for rank in range(world_size)]
            processes = [forked.Process(target=run_rank, args=(*each, action, folder, endpoint)) for each in ranks]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        num_failed += sum(process.exitcode != 0 for process in processes)
    return num_failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
