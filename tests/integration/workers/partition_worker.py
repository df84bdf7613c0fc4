"""Runs every case of one world size in one process group and writes down what it found; one process per rank."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed as dist

import sidecast
from sidecast.protos.shards import total_elements
from sidecast.trainer.integrations.deepspeed import hook_of
from sidecast.trainer.partitions import Partition
from sidecast.trainer.partitions.deepspeed import layout_of
from tests.integration.workers.partition_account import module_weights, of_all_ranks, optimizer_state_of, same_bits
from tests.integration.workers.partition_cases import ATTACHED_CASES, ATTACHED_WORLD_SIZE, CASES_OF_WORLD_SIZE, Case
from tests.integration.workers.partition_checks import CHECKS, CaseRun
from tests.integration.workers.partition_engines import build_engine, train


def run_case(case: Case, folder: Path) -> dict[str, str | None]:
    """Runs the checks of one case; the first failure ends it, as later checks build on earlier ones."""
    found: dict[str, str | None] = {}
    run = CaseRun(case, folder)
    for check in CHECKS:
        try:
            check(run)
            failure = None
        except AssertionError as error:
            failure = str(error)
        failures = [each for each in of_all_ranks(failure) if each is not None]
        found[check.__name__] = failures[0] if failures else None
        if failures:
            break
    run.engine.destroy()
    return found


def trained(case: Case, nowcaster: dict[str, Any] | None) -> tuple[list[Any], int]:
    """Everything that eight steps leave on this rank, and how many snapshots were staged on the way."""
    engine = sidecast.attach(build_engine(case, nowcaster))
    losses = train(engine, range(8))
    hook = hook_of(engine)
    num_staged = 0
    if hook is not None:
        num_staged = hook.summary()["num_staged"]
        hook.close()
    # Not the masters as they lie in memory: DeepSpeed never sets the padding among them, with or without a hook.
    partition = Partition(lambda: layout_of(engine))
    owned = torch.empty(total_elements(partition.owned_shards))
    partition.read_owned(owned)
    state = [losses, owned, optimizer_state_of(engine), module_weights(engine)]
    engine.destroy()
    return state, num_staged


def run_attached(case: Case) -> str | None:
    """What a hook that applies nothing changes; None if nothing."""
    # Nobody listens there: what training could notice is the reading and voting on this side.
    section = {
        "context_len": 2,
        "period_steps": 6,
        "probation_steps": 0,
        "endpoint": "127.0.0.1:1",
        "timeouts": {"connect_s": 0.05},
    }
    with_hook, num_staged = trained(case, section)
    without, _ = trained(case, None)
    failure = None if same_bits(with_hook, without) else "losses, masters, moments or weights differ"
    if num_staged == 0:
        failure = "nothing was staged, the check is void"
    return next((each for each in of_all_ranks(failure) if each is not None), None)


def main(scratch: Path, results: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world_size)
    # The shared-memory operator only speeds reductions up, and takes a C++ compiler minutes to build.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    # DeepSpeed refuses fp16 on processors without its instructions; torch computes it there too, slowly.
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo")
    for name, case in CASES_OF_WORLD_SIZE[world_size].items():
        folder = scratch / name
        found = run_case(case, folder)
        if rank == 0:
            (results / f"{name}.json").write_text(json.dumps(found))
    for name, case in ATTACHED_CASES.items() if world_size == ATTACHED_WORLD_SIZE else ():
        failure = run_attached(case)
        if rank == 0:
            (results / f"attached-{name}.json").write_text(json.dumps({"attached": failure}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
