"""Two ranks of Lightning's and Hugging Face's Trainers with FSDP2, nowcasted by a service; each writes what it saw.

Usage: python fsdp_trainers.py FOLDER ENDPOINT
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, TorchDynamoPlugin
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer

from tests.integration.workers import huggingface_runs, lightning_runs
from tests.integration.workers.lightning_runs import PERIOD_STEPS, SAVE_STEP

NUM_RANKS = 2
# Shortly after the first jump.
PLAIN_STEPS = PERIOD_STEPS + 2


class ShardedRegression(lightning_runs.Regression):
    """Sharded as Lightning's users do it."""

    def configure_model(self) -> None:
        for part in (self.net[0], self.net[2], self.net):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class ShardingTrainer(Trainer):
    """With FSDP2 by accelerate, which leaves it out where there are no GPUs unless it is told otherwise."""

    def create_accelerator_and_postprocess(self) -> None:
        state = AcceleratorState(cpu=True, dynamo_plugin=TorchDynamoPlugin(), _from_accelerator=True)
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
        )
        super().create_accelerator_and_postprocess()


def whole(parameters: Any) -> list[float]:
    """The sums of whole parameters, and that they were shards."""
    found = list(parameters)
    assert all(isinstance(parameter, DTensor) for parameter in found)
    return [parameter.full_tensor().double().sum().item() for parameter in found]


def with_lightning(settings: Mapping[str, Any] | None, **options: Any) -> dict[str, Any]:
    strategy: Any = ModelParallelStrategy(data_parallel_size=NUM_RANKS, tensor_parallel_size=1)
    module = ShardedRegression()
    losses, events, weights = lightning_runs.train(settings, strategy=strategy, module=module, **options)
    assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
    return {"losses": losses, "events": events, "weights": weights.tolist()}


def run_rank(rank: int, folder: Path, endpoint: str) -> None:
    """All runs of one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_RANKS)
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{NUM_RANKS}", TORCHELASTIC_RUN_ID="forked")
    os.environ.update(LOCAL_WORLD_SIZE=f"{NUM_RANKS}", GROUP_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    settings = lightning_runs.section(endpoint)
    checkpoint = folder / "lightning"
    seen = {"lightning plain": with_lightning(None, num_steps=PLAIN_STEPS)}
    seen["lightning straight"] = with_lightning(settings)
    with_lightning(settings, num_steps=SAVE_STEP, save=checkpoint)
    seen["lightning resumed"] = with_lightning(settings, load=checkpoint)
    options: dict[str, Any] = {"trainer_class": ShardingTrainer, "sums": whole}
    seen["huggingface plain"] = huggingface_runs.train(folder / "plain", None, num_steps=PLAIN_STEPS, **options)
    straight, resumed = huggingface_runs.straight_and_resumed(folder, endpoint, None, **options)
    seen |= {"huggingface straight": straight, "huggingface resumed": resumed}
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path, endpoint: str) -> int:
    """Forks the ranks, as importing takes longer than all their runs; returns how many have failed."""
    forked = multiprocessing.get_context("fork")
    ranks = [forked.Process(target=run_rank, args=(rank, folder, endpoint)) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return sum(process.exitcode != 0 for process in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
