"""Reads the edges of a graph in scaled space, as torch does it and as every backend must.

Shape suffixes: C context, F kernel elements, S source nodes, T target nodes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sidecast.predictors.nino.block_parts import BlockPart
from sidecast.predictors.passes import PartContext
from sidecast.predictors.scaling_pass import found_scale
from sidecast.predictors.state_reader import StateReader


class FeatureReader(Protocol):
    """Reads the edges of a graph in scaled space."""

    def features(self, part: BlockPart, context: PartContext) -> Tensor:
        """Edge features of a part, (F x C, T, S) fp32, kernel-element-major; structural edges have C."""
        ...


class ScaledReader:
    """Edge features by torch, contiguous along the sources.

    Args:
        context_len: States of each parameter, and features of each structural edge.
        reader: Brings states to where they are needed.
    """

    def __init__(self, context_len: int, reader: StateReader) -> None:
        self._context_len = context_len
        self._reader = reader

    def features(self, part: BlockPart, context: PartContext) -> Tensor:
        """See ``FeatureReader.features``."""
        if part.view is None:
            return torch.full((self._context_len, *part.grid), part.constant)
        states = self._reader.read(part, context)
        features_FCTS = torch.empty(part.num_kernel_elements, self._context_len, *part.grid)
        for position, state_TSF in enumerate(states):
            features_FCTS[:, position] = state_TSF.permute(2, 0, 1)
        scale = found_scale(part, context)
        return features_FCTS.sub_(scale.mean).mul_(scale.inverse).flatten(0, 1)
