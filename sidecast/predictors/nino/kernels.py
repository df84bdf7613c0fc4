"""The two loops in which nearly all the time of a nowcast goes, in tiles that stay in a core's cache.

Shape suffixes: D hidden, X edge features, S source nodes, T target nodes, F kernel elements, E edges of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu

from sidecast.predictors.nino.fusion import Affine

TILE_EDGES = 2_048
"""Two hidden vectors of each edge of a tile take 2 MiB in fp32; smaller tiles lose more to starting operators, and to
threads that wait for each other to do so, than they gain in the cache."""


@dataclass(frozen=True)
class Layer:
    """A hidden layer on the edges of one part, with what its nodes add to it already computed.

    Attributes:
        weight: (X, D) in the first layer, (D, D) in later ones.
        source_SD: Addend of each source; None for nothing.
        target_TD: Addend of each target with the bias in it; one row stands for all targets.
    """

    weight: Tensor
    source_SD: Tensor | None
    target_TD: Tensor


class Kernels(Protocol):
    """The tile loops, on whatever device their tensors are."""

    def message_sums(
        self, features_XTS: Tensor, layers: Sequence[Layer], scale_DD: Tensor, gain_SD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums over the sources of each target: of the hidden vectors h, and of (h @ scale) * gain.

        Args:
            features_XTS: Edge features of a part.
            layers: Hidden layers, each followed by SiLU.
            scale_DD: Applied to the last hidden vector.
            gain_SD: A factor for each source.

        Returns:
            Both sums, (T, D) fp32.
        """
        ...

    def changes(self, features_XTS: Tensor, layers: Sequence[Layer], output: Affine) -> Tensor:
        """Predicted scaled changes (T, S, F) of the parameters on the edges of a part.

        Args:
            features_XTS: Edge features of a part.
            layers: Hidden layers, each followed by SiLU.
            output: Last layer, one column for each kernel element.
        """
        ...


class _Scratch:
    """Hidden vectors of one tile, twice: fresh memory for every tile would cost page faults."""

    def __init__(self, num_edges: int, dim: int, dtype: torch.dtype) -> None:
        self._buffers = [torch.empty(num_edges * dim, dtype=dtype) for _ in range(2)]
        self._dim = dim
        self._current = 0

    def next(self, num_targets: int, num_sources: int) -> Tensor:
        """The buffer that was not handed out last, (T, S, D)."""
        self._current = 1 - self._current
        shape = (num_targets, num_sources, self._dim)
        return self._buffers[self._current][: num_targets * num_sources * self._dim].view(shape)


class CpuKernels:
    """Tiles of torch operators.

    Args:
        product_dtype: Precision of the D x D products; sums over edges and products with edge features are fp32.
        tile_edges: Edges worked on at once.
    """

    def __init__(self, product_dtype: torch.dtype = torch.float32, tile_edges: int = TILE_EDGES) -> None:
        self._product_dtype = product_dtype
        self._tile_edges = tile_edges

    def message_sums(
        self, features_XTS: Tensor, layers: Sequence[Layer], scale_DD: Tensor, gain_SD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernels.message_sums``."""
        dim = gain_SD.shape[1]
        hidden_TD, gained_TD = torch.zeros(2, features_XTS.shape[1], dim)
        layers, scale_DD = self._in_product_dtype(layers), scale_DD.to(self._product_dtype)
        scratch = _Scratch(self._tile_edges, dim, self._product_dtype)
        for targets, sources, features_XE in self._tiles(features_XTS):
            hidden_TSD = self._hidden(features_XE, layers, targets, sources, scratch)
            hidden_TD[targets] += hidden_TSD.sum(1, dtype=torch.float32)
            gained_TSD = scratch.next(*hidden_TSD.shape[:2])
            torch.mm(hidden_TSD.flatten(0, 1), scale_DD, out=gained_TSD.view(-1, dim))
            gained_TD[targets] += gained_TSD.mul_(gain_SD[sources]).sum(1, dtype=torch.float32)
        return hidden_TD, gained_TD

    def changes(self, features_XTS: Tensor, layers: Sequence[Layer], output: Affine) -> Tensor:
        """See ``Kernels.changes``."""
        _, num_targets, num_sources = features_XTS.shape
        layers, weight_DF = self._in_product_dtype(layers), output.weight.to(self._product_dtype)
        scratch = _Scratch(self._tile_edges, output.weight.shape[0], self._product_dtype)
        change_TSF = torch.empty(num_targets, num_sources, weight_DF.shape[1])
        for targets, sources, features_XE in self._tiles(features_XTS):
            hidden_TSD = self._hidden(features_XE, layers, targets, sources, scratch)
            torch.add(hidden_TSD @ weight_DF, output.bias, out=change_TSF[targets, sources])
        return change_TSF

    def _in_product_dtype(self, layers: Sequence[Layer]) -> list[Layer]:
        first, *later = layers
        return [first, *(replace(layer, weight=layer.weight.to(self._product_dtype)) for layer in later)]

    def _tiles(self, features_XTS: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        _, num_targets, num_sources = features_XTS.shape
        source_step = min(num_sources, self._tile_edges)
        target_step = max(1, self._tile_edges // source_step)
        for target in range(0, num_targets, target_step):
            targets = slice(target, min(target + target_step, num_targets))
            for source in range(0, num_sources, source_step):
                sources = slice(source, min(source + source_step, num_sources))
                yield targets, sources, features_XTS[:, targets, sources].flatten(1)

    def _hidden(
        self, features_XE: Tensor, layers: Sequence[Layer], targets: slice, sources: slice, scratch: _Scratch
    ) -> Tensor:
        first, *later = layers
        grid = (targets.stop - targets.start, sources.stop - sources.start)
        hidden_TSD = scratch.next(*grid)
        dim = hidden_TSD.shape[2]
        if hidden_TSD.dtype == torch.float32:
            _add_nodes(first, targets, sources, out=hidden_TSD)
            hidden_TSD.view(-1, dim).addmm_(features_XE.T, first.weight)
        else:
            single_TSD = torch.empty(hidden_TSD.shape)
            _add_nodes(first, targets, sources, out=single_TSD)
            hidden_TSD.copy_(single_TSD.view(-1, dim).addmm_(features_XE.T, first.weight).view(single_TSD.shape))
        silu(hidden_TSD, inplace=True)
        for layer in later:
            next_TSD = scratch.next(*grid)
            _add_nodes(layer, targets, sources, out=next_TSD)
            next_TSD.view(-1, dim).addmm_(hidden_TSD.view(-1, dim), layer.weight)
            hidden_TSD = silu(next_TSD, inplace=True)
        return hidden_TSD


def _add_nodes(layer: Layer, targets: slice, sources: slice, out: Tensor) -> None:
    target_TD = layer.target_TD if len(layer.target_TD) == 1 else layer.target_TD[targets]
    if layer.source_SD is None:
        out.copy_(target_TD[:, None])
    else:
        torch.add(layer.source_SD[sources], target_TD[:, None], out=out)
