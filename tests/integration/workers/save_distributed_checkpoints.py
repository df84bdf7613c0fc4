"""Worker that saves FSDP2 checkpoints with ``torch.distributed.checkpoint``, as plain loops and accelerate do.

Run by every rank; writes ``OUT/step-N`` and the weights to expect next to each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

STEPS = (10, 20, 30)


def main(out: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{out / 'rendezvous'}", rank=rank, world_size=world_size
    )
    torch.manual_seed(0)
    # Rows that do not divide evenly, fewer rows than ranks, a scalar buffer and 16-bit weights.
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1, dtype=torch.bfloat16))
    mesh = init_device_mesh("cpu", (world_size,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in STEPS:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.125
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state, "step": step}, checkpoint_id=out / f"step-{step}")
        whole = {
            name: (value.full_tensor() if isinstance(value, DTensor) else value).contiguous()
            for name, value in get_model_state_dict(model).items()
        }
        if rank == 0:
            save_file(whole, out / f"expected-{step}.safetensors")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
