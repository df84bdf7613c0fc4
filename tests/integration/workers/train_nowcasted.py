"""One rank of a tiny training run with the hook attached; ends when its standard input does.

Arguments: a folder where the ranks meet, the number of steps, and the ``nowcaster`` section as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path

import deepspeed
import torch
from torch import nn

import sidecast
from sidecast.trainer.integrations.deepspeed import hook_of


def main(folder: Path, num_steps: int, section: dict[str, object]) -> None:
    # The hook logs the ports of its metrics.
    logging.basicConfig(level=logging.INFO, force=True)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    rendezvous = f"file://{folder / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    # Compiling DeepSpeed's shared-memory operator would take longer than everything else here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "nowcaster": section,
        },
    )
    engine = sidecast.attach(engine)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(num_steps):
        inputs = torch.randn(4, 6, generator=generator)
        engine.backward((engine(inputs) - inputs[:, :3]).square().mean())
        engine.step()
    sys.stdin.read()
    nowcaster = hook_of(engine)
    assert nowcaster is not None
    nowcaster.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
