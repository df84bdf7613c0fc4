"""A small model sharded by ``fully_shard`` in many ways, and what torch itself says that it holds."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

WIDTH = 6
VOCABULARY = 7
NUM_TOKENS = 5


class Block(nn.Module):
    """What is gathered at once."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = states + torch.tanh(self.linear(self.norm(states)))
        return out


class Small(nn.Module):
    """Tied and frozen parameters, and some with fewer rows than there are ranks: nothing comes out even."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.few = nn.Parameter(torch.randn(2, WIDTH))
        self.first, self.second = Block(), Block()
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embed(tokens) + self.few.sum(0)
        out: Tensor = self.head(self.second(self.frozen(self.first(states))))
        return out


@dataclass(frozen=True)
class Case:
    """How a model is sharded and trained.

    Attributes:
        options: Of ``fully_shard``.
        has_replicas: Whether ranks are replicas of one another (HSDP) instead of holding shards.
        evaluates: Whether every step is followed by an evaluation, which leaves the root's parameters gathered.
        optimizer: Its class in ``torch.optim``.
    """

    options: dict[str, Any] = field(default_factory=dict)
    has_replicas: bool = False
    evaluates: bool = False
    optimizer: str = "AdamW"


def by_columns(parameter: nn.Parameter) -> Shard | None:
    """Matrices are cut along their second dimension, which has to come out even."""
    return Shard(1) if parameter.dim() == 2 else None


CASES = {
    "rows": Case(),
    "columns": Case({"shard_placement_fn": by_columns}),
    "bf16": Case({"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}),
    "replicas": Case(has_replicas=True, optimizer="Adagrad"),
    "offload": Case({"offload_policy": CPUOffloadPolicy(pin_memory=False)}, optimizer="SGD"),
    "gathered": Case({"reshard_after_forward": False}, evaluates=True),
}


def build(case: Case) -> tuple[Small, torch.optim.Optimizer]:
    """The model, sharded among all ranks, and its optimizer."""
    model, options = Small(), dict(case.options)
    if case.has_replicas:
        options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("replicas", "shards"))
    else:
        options["mesh"] = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (model.first, model.second, model):
        fully_shard(part, **options)
    more = {"momentum": 0.9} if case.optimizer == "SGD" else {}
    trained = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return model, getattr(torch.optim, case.optimizer)(trained, lr=2.0**-6, **more)


def batch(step: int, rank: int) -> Tensor:
    """Tokens, the same at the same step of the same rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(VOCABULARY, (4, NUM_TOKENS), generator=generator)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean loss of copying tokens."""
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int], *, evaluates: bool) -> list[float]:
    """Trains on this rank's batches; returns its losses."""
    losses = []
    for step in steps:
        loss = loss_of(model, batch(step, dist.get_rank()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if evaluates:
            with torch.no_grad():
                model(batch(0, 0))
    return losses


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """Torch's own account of the whole model, on every rank; collective."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def local_of(value: Any) -> Any:
    """This rank's memory, copied."""
    return value.to_local().detach().clone() if isinstance(value, DTensor) else deepcopy(value)


def held(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Every parameter on this rank, and what the optimizer keeps of it, copied."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return [
        (local_of(parameter), {key: local_of(value) for key, value in optimizer.state.get(parameter, {}).items()})
        for parameter in parameters
    ]


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """A distributed checkpoint of weights and optimizer; collective."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Puts back what ``save`` saved; collective."""
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
