"""Edge features by a Triton kernel: states of any strides and dtype in, scaled fp32 out, targets last.

Shape suffixes: C context, F kernel elements, S source nodes, T target nodes, X edge features (F x C).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidecast.predictors.nino.block_parts import BlockPart
from sidecast.predictors.passes import PartContext
from sidecast.predictors.scaling_pass import found_scale
from sidecast.predictors.state_reader import StateReader

_TILE = 4_096
"""Elements of one program's tile."""
_SIDE = 64
"""Longest side of a tile on which neither sources nor targets are few."""


@triton.jit
def _scaled_plane_kernel(  # type: ignore[no-untyped-def]
    state_TSF,
    feature_FST,
    num_targets,
    num_sources,
    target_stride,
    source_stride,
    kernel_stride,
    plane_stride,
    mean,
    inverse,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    targets = tl.cast(tl.program_id(0), tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    sources = tl.cast(tl.program_id(1), tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)[None, :]
    element = tl.cast(tl.program_id(2), tl.int64)
    present = (targets < num_targets) & (sources < num_sources)
    place = targets * target_stride + sources * source_stride + element * kernel_stride
    state = tl.load(state_TSF + place, mask=present, other=0.0).to(tl.float32)
    scaled = (state - mean) * inverse
    tl.store(feature_FST + element * plane_stride + sources * num_targets + targets, scaled, mask=present)


class TritonFeatures:
    """Edge features by one kernel for each state, contiguous along the targets.

    Args:
        context_len: States of each parameter, and features of each structural edge.
        reader: Brings states to the device.
    """

    def __init__(self, context_len: int, reader: StateReader) -> None:
        self._context_len = context_len
        self._reader = reader

    def features(self, part: BlockPart, context: PartContext) -> Tensor:
        """See ``FeatureReader.features``."""
        num_targets, num_sources = part.grid
        device = self._reader.device
        if part.view is None:
            constant_XST = torch.full((self._context_len, num_sources, num_targets), part.constant, device=device)
            return constant_XST.transpose(1, 2)
        num_elements = part.num_kernel_elements
        features_FCST = torch.empty(num_elements, self._context_len, num_sources, num_targets, device=device)
        scale = found_scale(part, context)
        block_sources = min(_SIDE, triton.next_power_of_2(num_sources))
        block_targets = min(_TILE // block_sources, triton.next_power_of_2(num_targets))
        grid = triton.cdiv(num_targets, block_targets), triton.cdiv(num_sources, block_sources), num_elements
        for position, state_TSF in enumerate(self._reader.read(part, context)):
            _scaled_plane_kernel[grid](
                state_TSF,
                features_FCST[:, position],
                num_targets,
                num_sources,
                *state_TSF.stride(),
                features_FCST.stride(0),
                scale.mean,
                scale.inverse,
                BLOCK_T=block_targets,
                BLOCK_S=block_sources,
            )
        return features_FCST.flatten(0, 1).transpose(1, 2)
