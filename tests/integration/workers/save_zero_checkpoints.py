"""Worker that trains one tiny model under every DeepSpeed optimizer wrapper and saves its checkpoints.

Run by every rank; writes ``OUT/<case>/global_step*`` and the weights to expect next to each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
from torch import Tensor, nn

CASES: dict[str, dict[str, Any]] = {
    "stage0_fp32": {"zero_optimization": {"stage": 0}},
    "stage0_bf16": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "stage1_fp32": {"zero_optimization": {"stage": 1}},
    "stage1_bf16_optimizer": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
    },
    "stage2_round_robin": {"zero_optimization": {"stage": 2, "round_robin_gradients": True}, "bf16": {"enabled": True}},
    "stage3_bf16": {
        "zero_optimization": {"stage": 3, "sub_group_size": 40, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": True},
    },
}


class TiedModel(nn.Module):
    """Tied weights, a frozen parameter, floating and integer buffers, and numels that two ranks do not divide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.norm = nn.LayerNorm(7)
        self.hidden = nn.Linear(7, 5)
        self.frozen = nn.Linear(5, 7)
        self.frozen.requires_grad_(False)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor([0.5, 0.25]))
        self.register_buffer("count", torch.tensor(3))

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.norm(self.embed(tokens))
        states = states + self.frozen(torch.tanh(self.hidden(states))) * self.scale[0].to(states.dtype)
        return nn.functional.cross_entropy(self.head(states).float().flatten(0, 1), tokens.roll(-1, 1).flatten())


def main(out: Path) -> None:
    rendezvous = f"file://{out / 'rendezvous'}"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    # Compiling DeepSpeed's shared-memory operator would take longer than everything else here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    for case, settings in CASES.items():
        torch.manual_seed(0)
        model = TiedModel()
        decayed = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
        others = [p for p in model.parameters() if p.requires_grad and p.ndim != 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=groups,
            config={
                "train_micro_batch_size_per_gpu": 2,
                "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
                "zero_allow_untested_optimizer": True,
                **settings,
            },
        )
        for step in range(1, 4):
            tokens = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(step * 10 + rank))
            engine.backward(engine(tokens))
            engine.step()
            engine.save_checkpoint(str(out / case))
            expected = expected_weights(case, engine, out / case)
            if rank == 0:
                save_file(expected, out / case / f"expected_{step}.safetensors")
        engine.destroy()


def expected_weights(case: str, engine: Any, folder: Path) -> dict[str, Tensor]:
    """The fp32 weights under every name, from DeepSpeed itself."""
    if case.startswith(("stage2", "stage3", "stage1_fp32")):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(folder))
        if case.startswith("stage1"):
            # DeepSpeed's converter forgets them at stage 1.
            weights |= {name: tensor for name, tensor in engine.module.state_dict().items() if "frozen" in name}
    else:
        weights = {name: tensor.detach().float() for name, tensor in engine.module.state_dict().items()}
        weights |= masters(case, engine)
        weights["head.weight"] = weights["embed.weight"]
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def masters(case: str, engine: Any) -> dict[str, Tensor]:
    """The fp32 masters by name, read from the live optimizer."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    optimizer = engine.optimizer
    if case == "stage1_bf16_optimizer":
        from deepspeed.utils import safe_get_full_fp32_param

        return {names[id(p)]: safe_get_full_fp32_param(p).detach() for group in optimizer.bf16_groups for p in group}
    if case == "stage0_bf16":
        found = {}
        for group, masters_of_group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for parameter, master in zip(group, masters_of_group, strict=True):
                found[names[id(parameter)]] = master.detach()
        return found
    return {}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
