"""The first pass of every trained predictor: the scale of each parameter tensor.

Shape suffixes: C context, F kernel elements, S source nodes, T target nodes.
"""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from sidecast.manifest import ModelManifest
from sidecast.predictors.base import non_finite
from sidecast.predictors.block_parts import BlockPart, read_part
from sidecast.predictors.passes import Found, PartContext
from sidecast.scaling import Moments, Scale

SCALES = "scales"
"""Key of the found scales: mean and deviation of each parameter in manifest order, (parameters, 2) fp64."""


class ScalingPass:
    """Sums the moments of every parameter, and finds its scale.

    Args:
        predictor: Name for messages.
        manifest: The model.
    """

    def __init__(self, predictor: str, manifest: ModelManifest) -> None:
        self._predictor = predictor
        self._row = {spec.fqn: row for row, spec in enumerate(manifest.parameters)}

    def zeros(self) -> Tensor:
        return torch.zeros(len(self._row), 3, dtype=torch.float64)

    def map(self, part: BlockPart, context: PartContext) -> Tensor | None:
        if part.view is None:
            return None
        start = context.manifest.offsets[part.view.fqn]
        moments = Moments.of(read_part(part, context.states, start), _pivot(context, start))
        return torch.tensor([moments.count, moments.total, moments.total_squared], dtype=torch.float64)

    def add(self, part: BlockPart, contribution: Tensor, sums: Tensor) -> None:
        assert part.view is not None
        sums[self._row[part.view.fqn]] += contribution

    def finish(self, sums: Tensor, context: PartContext) -> Found:
        scales = []
        for spec, (count, total, total_squared) in zip(context.manifest.parameters, sums.tolist(), strict=True):
            if not isfinite(total_squared):
                raise non_finite(self._predictor, spec.fqn)
            pivot = _pivot(context, context.manifest.offsets[spec.fqn]) if spec.numel else 0.0
            scale = Moments(int(count), total, total_squared).scale(pivot)
            scales.append([scale.mean, scale.std])
        return {SCALES: torch.tensor(scales, dtype=torch.float64)}


class ScaledReader:
    """Reads parts in scaled space.

    Args:
        manifest: The model.
        feature_dim: Features of each structural edge, of which the first ``context_len`` are its constant.
    """

    def __init__(self, manifest: ModelManifest, context_len: int) -> None:
        self._row = {spec.fqn: row for row, spec in enumerate(manifest.parameters)}
        self._context_len = context_len

    def scale(self, part: BlockPart, context: PartContext) -> Scale:
        assert part.view is not None
        mean, std = context.found[SCALES][self._row[part.view.fqn]].tolist()
        return Scale(mean, std)

    def features(self, part: BlockPart, context: PartContext) -> Tensor:
        """Edge features of a part, (F x C, T, S) fp32, kernel-element-major."""
        if part.view is None:
            return torch.full((self._context_len, *part.grid), part.constant)
        states = read_part(part, context.states, context.manifest.offsets[part.view.fqn])
        features_FCTS = torch.empty(part.num_kernel_elements, self._context_len, *part.grid)
        for position, state_TSF in enumerate(states):
            features_FCTS[:, position] = state_TSF.permute(2, 0, 1)
        scale = self.scale(part, context)
        return features_FCTS.sub_(scale.mean).mul_(scale.inverse).flatten(0, 1)


def _pivot(context: PartContext, start: int) -> float:
    # Of the newest state, because every worker can read it without waiting for another.
    return float(context.states[-1][start])
