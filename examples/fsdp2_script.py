"""Nowcasting in a plain loop with FSDP2, and checkpoints that resume it. Beside a running `sidecast serve`:

torchrun --nproc-per-node 2 examples/fsdp2_script.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sidecast


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Weights and optimizer, sharded, and the nowcasting beside them; every rank calls it."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)
    sidecast.save_nowcasting(model, folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Goes on from what ``save`` saved; every rank calls it."""
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    sidecast.resume_nowcasting(model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", default="127.0.0.1:50051", help="of the nowcaster service")
    parser.add_argument("--predictor", default="linear")
    # So small a model outruns its nowcasts. A real one need not wait for them: async is the setting's own default.
    parser.add_argument("--mode", choices=["async", "sync"], default="sync", help="async: never wait for a nowcast")
    parser.add_argument("--period-steps", type=int, default=50, help="steps between nowcasts")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--save-to", type=Path, help="folder for a checkpoint at the end")
    parser.add_argument("--resume-from", type=Path, help="folder of such a checkpoint")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for part in (*model, model):
        fully_shard(part, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sidecast.attach(
        model,
        optimizer,
        {
            "endpoint": args.endpoint,
            "predictor": args.predictor,
            "mode": args.mode,
            "period_steps": args.period_steps,
        },
    )
    if args.resume_from is not None:
        load(model, optimizer, args.resume_from)

    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(1, args.max_steps + 1):
        inputs = torch.randn(32, 16, generator=generator).to(device)
        loss = (model(inputs) - inputs.square().mean(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 and dist.get_rank() == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    if args.save_to is not None:
        save(model, optimizer, args.save_to)
    hook = sidecast.hook_of(model)
    if hook is not None:
        summary = hook.summary()
        hook.close()
        if dist.get_rank() == 0:
            print(f"{summary['num_applied']} nowcasts applied, {summary['num_rolled_back']} of them undone")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
