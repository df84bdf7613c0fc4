"""The first pass of every trained predictor, which finds the scale of each parameter tensor."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from sidecast.manifest import ModelManifest
from sidecast.predictors.base import non_finite
from sidecast.predictors.passes import Found, Part, PartContext
from sidecast.predictors.state_reader import StateReader
from sidecast.scaling import Moments, Scale, moment_sums

SCALES = "scales"
"""Key of the found scales: mean and deviation of each parameter in manifest order, (parameters, 2) fp64."""


class ScalingPass:
    """Sums the moments of every parameter, and finds its scale.

    Args:
        predictor: Name for messages.
        manifest: The model.
        reader: Brings states to where they are summed.
    """

    def __init__(self, predictor: str, manifest: ModelManifest, reader: StateReader) -> None:
        self._predictor = predictor
        self._manifest = manifest
        self._reader = reader

    def zeros(self, context: PartContext) -> Tensor:
        return torch.zeros(len(self._manifest.parameters), 3, dtype=torch.float64, device=self._reader.device)

    def map(self, part: Part, context: PartContext) -> Tensor | None:
        if part.fqn is None:
            return None
        return moment_sums(self._reader.read(part, context), _pivot(context, part.fqn))

    def add(self, part: Part, contribution: Tensor, sums: Tensor) -> None:
        assert part.fqn is not None
        sums[self._manifest.rows[part.fqn]] += contribution

    def finish(self, sums: Tensor, context: PartContext) -> Found:
        scales = []
        for spec, (count, total, total_squared) in zip(context.manifest.parameters, sums.tolist(), strict=True):
            if not isfinite(total_squared):
                raise non_finite(self._predictor, spec.fqn)
            pivot = float(_pivot(context, spec.fqn)) if spec.numel else 0.0
            scale = Moments(int(count), total, total_squared).scale(pivot)
            scales.append([scale.mean, scale.std])
        return {SCALES: torch.tensor(scales, dtype=torch.float64)}


def found_scale(part: Part, context: PartContext) -> Scale:
    """The scale of a part's parameter, as the first pass found it."""
    assert part.fqn is not None
    mean, std = context.found[SCALES][context.manifest.rows[part.fqn]].tolist()
    return Scale(mean, std)


def _pivot(context: PartContext, fqn: str) -> Tensor:
    # Of the newest state, because every worker can read it without waiting for another.
    return context.states[-1][context.manifest.offsets[fqn]]
