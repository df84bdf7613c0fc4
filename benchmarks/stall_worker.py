"""One rank of ``bench_stall``: trains under the hook, times windows of steps and copies of its shard, writes JSON.

Usage: python stall_worker.py SETTINGS_JSON  (RANK, WORLD_SIZE and LOCAL_RANK in the environment)
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint import async_save
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from transformers import LlamaConfig, LlamaForCausalLM

import sidecast
from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.integrations.deepspeed import hook_of

CONTEXT_LEN = 5


def build_engine(settings: dict[str, Any]) -> Any:
    """The model under the ZeRO stage, with one snapshot every three windows, for jumps or for pushes."""
    torch.manual_seed(0)
    model = build_model(settings)
    interval_steps = 3 * settings["window_steps"]
    policy: dict[str, Any] = {
        "context_len": CONTEXT_LEN,
        "period_steps": CONTEXT_LEN * interval_steps,
        # What a snapshot costs is measured here, not what a jump does.
        "max_relative_norm": 1e-30,
        "rollback": "off",
    }
    if settings["policy"] == "push":
        policy = {"policy": "push", "push": {"interval_steps": interval_steps, "start_step": 0}}
    config = {
        "train_micro_batch_size_per_gpu": settings["batch_size"],
        "zero_optimization": {"stage": settings["stage"]},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "nowcaster": {"endpoint": settings["endpoint"], "require": True, **policy},
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-4), config=config
    )
    return sidecast.attach(engine)


def build_model(settings: dict[str, Any]) -> LlamaForCausalLM:
    """The model of the preset, or of a GGUF file with its weights."""
    if settings["gguf"] is None:
        return LlamaForCausalLM(LlamaConfig(**settings["model"], tie_word_embeddings=True))
    path = Path(settings["gguf"])
    return LlamaForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def timed(work: Callable[[], object]) -> float:
    """Seconds that the caller is held up."""
    started_s = time.perf_counter()
    work()
    return time.perf_counter() - started_s


class Peers:
    """What else one could do with the same shard at the same place.

    Args:
        masters: The rank's fp32 masters.
        folder: For checkpoints.
        rank: The rank.
    """

    def __init__(self, masters: list[Tensor], folder: Path, rank: int) -> None:
        self._state = {f"rank{rank}.master{index}": master.detach() for index, master in enumerate(masters)}
        self._folder = folder
        self._source = [np.array(master.detach().numpy().reshape(-1)) for master in masters]
        self._copy = [np.zeros_like(each) for each in self._source]
        self._addend = [torch.from_numpy(each) for each in self._source]
        self._sum = [torch.from_numpy(each) for each in self._copy]
        options = StagingOptions(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
        )
        self._stager = DefaultStager(options)
        # Its cache is filled by the first save.
        self.cached_async_save()

    def memcpy(self) -> float:
        """Into memory that is there, one call per master."""

        def copy() -> None:
            for target, source in zip(self._copy, self._source, strict=True):
                np.copyto(target, source)

        return timed(copy)

    def addition(self) -> float:
        """A multiple of a vector onto another in one pass, one call per master, without any publication."""

        def add() -> None:
            for target, source in zip(self._sum, self._addend, strict=True):
                target.add_(source, alpha=1e-30)

        return timed(add)

    def default_async_save(self) -> float:
        """As PyTorch does it unless told otherwise."""
        return self._save(None)

    def cached_async_save(self) -> float:
        """With a stager that keeps its shared memory."""
        return self._save(self._stager)

    def _save(self, stager: DefaultStager | None) -> float:
        futures: list[Any] = []
        seconds = timed(
            lambda: futures.append(async_save(self._state, checkpoint_id=self._folder / "save", async_stager=stager))
        )
        futures[0].result()
        dist.barrier()
        return seconds


def main(settings: dict[str, Any]) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    folder = Path(settings["folder"])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=int(os.environ["WORLD_SIZE"])
    )
    deepspeed.init_distributed(dist_backend="gloo")
    engine = build_engine(settings)
    hook = hook_of(engine)
    assert isinstance(hook, NowcastHook)
    generator = torch.Generator().manual_seed(rank)
    shape = (settings["batch_size"], settings["sequence_length"])
    vocab_size = engine.module.config.vocab_size

    def step() -> None:
        tokens = torch.randint(0, vocab_size, shape, generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()

    window_steps = settings["window_steps"]
    results: dict[str, list[float]] = {
        name: []
        for name in ("snapshot", "calm", "control", "blocked", "staging", "memcpy", "addition", "default", "cached")
    }
    cycles: list[dict[str, Any]] = []
    step_s: list[float] = []
    calm_blocked_s: list[float] = []
    # The first snapshot touches memory for the first time; it is not of the steady state.
    for _ in range(3 * window_steps - 1):
        step()
    peers: Peers | None = None
    for cycle in range(settings["num_cycles"] + 1):
        dist.barrier()
        staged_s = hook.totals.staging_s
        windows, blocked_s, num_applied = [], [], [hook.totals.num_applied]
        for _ in range(3):
            times = []
            for _ in range(window_steps):
                before_s = hook.totals.blocked_s
                times.append(timed(step))
                blocked_s.append(hook.totals.blocked_s - before_s)
            windows.append(sum(times))
            num_applied.append(hook.totals.num_applied)
            if len(windows) > 1:
                step_s += times
        if peers is None:
            peers = Peers(masters_of(engine), folder, rank)
            continue
        # A nowcast is made beside a base's window, on this same machine; it is not what a snapshot costs a trainer.
        if (cycle + 1) % CONTEXT_LEN != 0:
            results["snapshot"].append(windows[0])
            results["calm"].append(windows[1])
            results["control"].append(windows[2])
        applied = [after - before for before, after in itertools.pairwise(num_applied)]
        cycles.append({"windows": windows, "applied": applied, "blocked": sum(blocked_s)})
        results["blocked"].append(blocked_s[0])
        calm_blocked_s += blocked_s[1:]
        results["staging"].append(hook.totals.staging_s - staged_s)
        results["memcpy"] += [peers.memcpy(), peers.memcpy()]
        results["addition"] += [peers.addition(), peers.addition()]
        if cycle <= settings["num_saves"]:
            results["default"].append(peers.default_async_save())
            results["cached"].append(peers.cached_async_save())
        dist.barrier()
    summary = hook.summary()
    shard_bytes = sum(master.nbytes for master in masters_of(engine))
    hook.close()
    shutil.rmtree(folder / "save", ignore_errors=True)
    report = {
        **results,
        "cycles": cycles,
        "step": step_s,
        "calm_blocked": calm_blocked_s,
        "shard_bytes": shard_bytes,
        "num_staged": summary["num_staged"],
        "num_applied": summary["num_applied"],
        "num_committed": summary["num_committed"],
        "num_dropped": summary["num_dropped"],
        "bytes_uploaded": summary["bytes_uploaded"],
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


def masters_of(engine: Any) -> list[Tensor]:
    """The rank's fp32 masters, whichever stage holds them."""
    optimizer = engine.optimizer
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if hasattr(optimizer, name):
            return list(getattr(optimizer, name))
    return [parameter.data for parameter in engine.module.parameters()]


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
