"""The two loops in which nearly all the time of a nowcast goes, in tiles that stay in a core's cache.

Shape suffixes: D hidden, X edge features, S source nodes, T target nodes, F kernel elements, E edges of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import silu

from sidecast.predictors.nino_fusion import Affine

TILE_EDGES = 1_024
"""Two hidden vectors of each edge of a tile take 1 MiB in fp32: measured best with caches of 0.5 MiB and more."""


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


class CpuKernels:
    """Tiles of torch operators.

    Args:
        product_dtype: Precision of the D x D products; the rest is fp32.
        tile_edges: Edges worked on at once.
    """

    def __init__(self, product_dtype: torch.dtype = torch.float32, tile_edges: int = TILE_EDGES) -> None:
        self._product_dtype = product_dtype
        self._tile_edges = tile_edges

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
        _, num_targets, _ = features_XTS.shape
        dim = gain_SD.shape[1]
        hidden_TD, gained_TD = torch.zeros(2, num_targets, dim)
        scale_DD = scale_DD.to(self._product_dtype)
        for targets, sources, features_XE in self._tiles(features_XTS):
            grid = (targets.stop - targets.start, sources.stop - sources.start, dim)
            hidden_ED = self._hidden(features_XE, layers, targets, sources)
            gained_ED = hidden_ED @ scale_DD
            hidden_TD[targets] += hidden_ED.view(grid).sum(1, dtype=torch.float32)
            gained = gained_ED.to(torch.float32).view(grid).mul_(gain_SD[sources])
            gained_TD[targets] += gained.sum(1)
        return hidden_TD, gained_TD

    def changes(self, features_XTS: Tensor, layers: Sequence[Layer], output: Affine) -> Tensor:
        """Predicted scaled changes (T, S, F) of the parameters on the edges of a part.

        Args:
            features_XTS: Edge features of a part.
            layers: Hidden layers, each followed by SiLU.
            output: Last layer, one column for each kernel element.
        """
        _, num_targets, num_sources = features_XTS.shape
        weight_DF = output.weight.to(self._product_dtype)
        change_TSF = torch.empty(num_targets, num_sources, weight_DF.shape[1])
        for targets, sources, features_XE in self._tiles(features_XTS):
            tile = change_TSF[targets, sources]
            change_EF = self._hidden(features_XE, layers, targets, sources) @ weight_DF
            torch.add(change_EF.view(tile.shape), output.bias, out=tile)
        return change_TSF

    def _tiles(self, features_XTS: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        _, num_targets, num_sources = features_XTS.shape
        source_step = min(num_sources, self._tile_edges)
        target_step = max(1, self._tile_edges // source_step)
        for target in range(0, num_targets, target_step):
            targets = slice(target, min(target + target_step, num_targets))
            for source in range(0, num_sources, source_step):
                sources = slice(source, min(source + source_step, num_sources))
                yield targets, sources, features_XTS[:, targets, sources].flatten(1)

    def _hidden(self, features_XE: Tensor, layers: Sequence[Layer], targets: slice, sources: slice) -> Tensor:
        first, *later = layers
        hidden_ED = self._addends(first, targets, sources, torch.float32).addmm_(features_XE.T, first.weight)
        hidden_ED = silu(hidden_ED, inplace=True).to(self._product_dtype)
        for layer in later:
            addend_ED = self._addends(layer, targets, sources, self._product_dtype)
            hidden_ED = silu(addend_ED.addmm_(hidden_ED, layer.weight.to(self._product_dtype)), inplace=True)
        return hidden_ED

    def _addends(self, layer: Layer, targets: slice, sources: slice, dtype: torch.dtype) -> Tensor:
        num_targets, num_sources = targets.stop - targets.start, sources.stop - sources.start
        dim = layer.target_TD.shape[1]
        target_TD = layer.target_TD if len(layer.target_TD) == 1 else layer.target_TD[targets]
        addend_TSD = torch.empty(num_targets, num_sources, dim, dtype=dtype)
        if layer.source_SD is None:
            addend_TSD.copy_(target_TD[:, None])
        else:
            torch.add(layer.source_SD[sources], target_TD[:, None], out=addend_TSD)
        return addend_TSD.flatten(0, 1)
