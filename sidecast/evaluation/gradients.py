"""Losses and gradients of many members, tile by tile, so that what a tile keeps for its backward pass stays in a cache.

Shape suffixes: M members, P elements of the parameter vector, B sequences, L tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.evaluation.models.model import Model, views

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the arithmetic is done. The precision is part of a result's name; the rest changes round-off only."""

    device: str = "cpu"
    """Where: ``cpu``, or ``cuda`` and so on."""
    precision: str = "fp32"
    """Of matrix products: ``fp32``, or ``bf16`` by autocast."""
    tile_members: int | None = None
    """Members in one tile; None: one on a CPU, where more of them only drive each other out of its caches, else all."""
    tile_sequences: int | None = None
    """Sequences in one tile; None: all."""
    is_native: bool = True
    """Whether compiled arithmetic is used where there is any for the model and the machine."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision!r}; allowed: {', '.join(PRECISIONS)}")
        for name in ("tile_members", "tile_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")

    def member_tiles(self, num_members: int) -> list[slice]:
        """The members of each tile."""
        size = self.tile_members or (1 if self.device == "cpu" else num_members)
        return _slices(num_members, size)

    def sequence_tiles(self, num_sequences: int) -> list[slice]:
        """The sequences of each tile."""
        return _slices(num_sequences, self.tile_sequences or num_sequences)


class Gradients(Protocol):
    """Computes what an optimizer needs."""

    def __call__(self, params_MP: Tensor, tokens_BL: Tensor, targets_BL: Tensor, out_MP: Tensor) -> Tensor:
        """Writes each member's gradient to ``out_MP``; returns each member's mean loss (M,)."""
        ...

    def losses(self, params_MP: Tensor, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """Each member's mean loss (M,), always in fp32."""
        ...


class AutogradGradients:
    """Implements ``Gradients`` for any model.

    Args:
        model: The model.
        engine: How.
    """

    def __init__(self, model: Model, engine: Engine) -> None:
        self._model = model
        self._engine = engine

    def __call__(self, params_MP: Tensor, tokens_BL: Tensor, targets_BL: Tensor, out_MP: Tensor) -> Tensor:
        losses_M = torch.zeros(len(params_MP), device=params_MP.device)
        out_MP.zero_()
        for members in self._engine.member_tiles(len(params_MP)):
            leaves = {name: view.detach().requires_grad_() for name, view in self._views(params_MP[members]).items()}
            for sequences in self._engine.sequence_tiles(len(tokens_BL)):
                with self.autocast():
                    share = len(tokens_BL[sequences]) / len(tokens_BL)
                    tile_losses_M = share * self._model.losses(leaves, tokens_BL[sequences], targets_BL[sequences])
                gradients = torch.autograd.grad(tile_losses_M.sum(), list(leaves.values()))
                for view, gradient in zip(self._views(out_MP[members]).values(), gradients, strict=True):
                    view.add_(gradient)
                losses_M[members] += tile_losses_M.detach()
        return losses_M

    @torch.no_grad()
    def losses(self, params_MP: Tensor, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """See ``Gradients``."""
        tiles = self._engine.member_tiles(len(params_MP))
        return torch.cat([self._model.losses(self._views(params_MP[each]), tokens_BL, targets_BL) for each in tiles])

    def autocast(self) -> torch.autocast:
        """Matrix products in the engine's precision."""
        is_cast = self._engine.precision == "bf16"
        return torch.autocast(torch.device(self._engine.device).type, dtype=torch.bfloat16, enabled=is_cast)

    def _views(self, vectors_MP: Tensor) -> dict[str, Tensor]:
        return views(self._model, vectors_MP)


def mean_losses(gradients: Gradients, params_MP: Tensor, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """The mean loss of each member over batches of equal size."""
    sums_M = torch.zeros(len(params_MP), dtype=torch.float64, device=params_MP.device)
    for tokens_BL, targets_BL in batches:
        sums_M += gradients.losses(params_MP, tokens_BL, targets_BL).double()
    losses: list[float] = (sums_M / len(batches)).tolist()
    return losses


def _slices(total: int, size: int) -> list[slice]:
    return list(_cut(total, size))


def _cut(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(total, start + size))
