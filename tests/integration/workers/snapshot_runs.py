"""Trains to the first snapshot under several ZeRO settings and keeps what DeepSpeed itself holds at that step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

import sidecast
from sidecast.trainer.integrations.deepspeed import hook_of
from tests.integration.workers.snapshot_cases import CASES, SNAPSHOT_STEP
from tests.integration.workers.tiny_job import new_engine, pacer_of, train


def reference(engine: Any, stage: int, dtype: str, folder: Path) -> dict[str, torch.Tensor]:
    """What DeepSpeed holds, by parameter name, in fp32."""
    if stage > 0:
        engine.save_checkpoint(str(folder), tag="reference")
        state = get_fp32_state_dict_from_zero_checkpoint(str(folder), tag="reference")
        return {name: value.detach() for name, value in state.items()}
    named = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}
    if dtype == "fp32":
        return {name: value.detach().clone() for name, value in named.items()}
    optimizer = engine.optimizer
    names = {id(value): name for name, value in named.items()}
    return {
        names[id(low)]: master.detach().clone().view(low.shape)
        for lows, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for low, master in zip(lows, masters, strict=True)
    }


def is_known_to_all(is_known: bool) -> bool:
    """Whether every rank knows, so that all leave the loop at the same step."""
    flag = torch.tensor([is_known], dtype=torch.int64)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def compare_snapshots(rank: int, address: str, folder: Path) -> None:
    """Trains every case to its first snapshot, and until the service has it."""
    for seed, (name, (stage, dtype)) in enumerate(CASES.items()):
        section = {"endpoint": address, "require": True, "period_steps": 5 * SNAPSHOT_STEP}
        engine = sidecast.attach(new_engine(section, stage=stage, dtype=dtype, seed=seed))
        nowcaster = hook_of(engine)
        assert nowcaster is not None
        committed: list[int] = []
        nowcaster.add_listener(
            lambda event, seen=committed: (
                seen.append(int(event.details["snapshot_step"])) if event.kind == "committed" else None
            )
        )
        losses = train(engine, rank)
        pacer = pacer_of(engine)
        for _ in range(SNAPSHOT_STEP):
            next(losses)
        state = reference(engine, stage, dtype, folder / name)
        # Training goes on, as it does for users, until the service has the whole snapshot.
        while not is_known_to_all(bool(committed)):
            # Not so far that later snapshots push this one out.
            pacer.wait()
            next(losses)
        if rank == 0:
            torch.save(state, folder / f"{name}.pt")
            names = [spec.fqn for spec in nowcaster.parameters]
            result = {"session": nowcaster.session_id, "parameters": names, "committed": committed}
            (folder / f"{name}.json").write_text(json.dumps(result))
        nowcaster.close()
