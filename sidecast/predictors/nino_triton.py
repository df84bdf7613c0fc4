"""The two tile loops of a nowcast as Triton kernels, for tensors on a GPU.

Under Triton's interpreter (``TRITON_INTERPRET=1`` before this module is imported) they run on CPU tensors.

Shape suffixes: D hidden, X edge features, S source nodes, T target nodes, F kernel elements, L hidden layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.predictors.nino_fusion import Affine
from sidecast.predictors.nino_kernels import Layer

_MIN_DOT = 16
"""Smallest side of a matrix product in Triton."""


@triton.jit
def _product(hidden, weight, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    if PRECISION == "bf16":
        return tl.dot(hidden.to(tl.bfloat16), weight.to(tl.bfloat16))
    return tl.dot(hidden, weight, input_precision=PRECISION)


@triton.jit
def _hidden_tile(  # type: ignore[no-untyped-def]
    features_XTS,
    first_XD,
    later_LDD,
    source_LSD,
    target_LTD,
    target,
    sources,
    num_targets,
    num_sources,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_SOURCE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = tl.arange(0, D)
    rows = tl.arange(0, D)
    inputs = tl.arange(0, X_PADDED)
    present = (sources < num_sources)[:, None]
    x = tl.load(
        features_XTS + (inputs[None, :] * num_targets + target) * num_sources + sources[:, None],
        mask=present & (inputs < X)[None, :],
        other=0.0,
    )
    first = tl.load(first_XD + inputs[:, None] * D + columns[None, :], mask=(inputs < X)[:, None], other=0.0)
    # Edge features are few: their product is cheap, and its rounding would reach every sum.
    hidden = tl.dot(x, first, input_precision="ieee")
    for layer in tl.static_range(NUM_LAYERS):
        if layer > 0:
            weight = tl.load(later_LDD + ((layer - 1) * D + rows[:, None]) * D + columns[None, :])
            hidden = _product(hidden, weight, PRECISION)
        hidden += tl.load(target_LTD + (layer * num_targets + target) * D + columns)[None, :]
        if (LAYERS_WITH_SOURCE >> layer) & 1:
            addend = source_LSD + (layer * num_sources + sources[:, None]) * D + columns[None, :]
            hidden += tl.load(addend, mask=present, other=0.0)
        hidden = hidden * tl.sigmoid(hidden)
    return hidden


@triton.jit
def _message_sums_kernel(  # type: ignore[no-untyped-def]
    features_XTS,
    first_XD,
    later_LDD,
    source_LSD,
    target_LTD,
    scale_DD,
    gain_SD,
    hidden_TD,
    gained_TD,
    num_targets,
    num_sources,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_SOURCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    # One program owns all sources of its target, so that sums need no atomics and always add in one order.
    target = tl.program_id(0)
    columns = tl.arange(0, D)
    rows = tl.arange(0, D)
    scale = tl.load(scale_DD + rows[:, None] * D + columns[None, :])
    hidden_sum = tl.zeros((D,), dtype=tl.float32)
    gained_sum = tl.zeros((D,), dtype=tl.float32)
    for start in range(0, num_sources, BLOCK_S):
        sources = start + tl.arange(0, BLOCK_S)
        present = (sources < num_sources)[:, None]
        hidden = _hidden_tile(
            features_XTS,
            first_XD,
            later_LDD,
            source_LSD,
            target_LTD,
            target,
            sources,
            num_targets,
            num_sources,
            X,
            X_PADDED,
            D,
            NUM_LAYERS,
            LAYERS_WITH_SOURCE,
            PRECISION,
        )
        gain = tl.load(gain_SD + sources[:, None] * D + columns[None, :], mask=present, other=0.0)
        hidden_sum += tl.sum(tl.where(present, hidden, 0.0), axis=0)
        gained_sum += tl.sum(_product(hidden, scale, PRECISION) * gain, axis=0)
    tl.store(hidden_TD + target * D + columns, hidden_sum)
    tl.store(gained_TD + target * D + columns, gained_sum)


@triton.jit
def _changes_kernel(  # type: ignore[no-untyped-def]
    features_XTS,
    first_XD,
    later_LDD,
    source_LSD,
    target_LTD,
    output_FD,
    bias_F,
    change_TSF,
    num_targets,
    num_sources,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_SOURCE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
    F: tl.constexpr,
):
    target = tl.program_id(0)
    sources = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    columns = tl.arange(0, D)
    hidden = _hidden_tile(
        features_XTS,
        first_XD,
        later_LDD,
        source_LSD,
        target_LTD,
        target,
        sources,
        num_targets,
        num_sources,
        X,
        X_PADDED,
        D,
        NUM_LAYERS,
        LAYERS_WITH_SOURCE,
        PRECISION,
    )
    for element in tl.static_range(F):
        weight = tl.load(output_FD + element * D + columns)
        change = tl.sum(hidden * weight[None, :], axis=1) + tl.load(bias_F + element)
        tl.store(change_TSF + (target * num_sources + sources) * F + element, change, mask=sources < num_sources)


class TritonKernels:
    """The tile loops as one kernel each; hidden vectors never leave the chip.

    Args:
        precision: Of the D x D products: ``ieee`` (fp32), ``tf32`` or ``bf16``; sums are fp32.
        block_sources: Edges of one tile, a power of two of at least 16.
    """

    def __init__(self, precision: str = "bf16", block_sources: int = 64) -> None:
        if precision not in {"ieee", "tf32", "bf16"}:
            raise ConfigError(f"precision is {precision!r}; allowed: ieee, tf32, bf16")
        if block_sources < _MIN_DOT or block_sources & (block_sources - 1):
            raise ConfigError(f"block_sources is {block_sources}; it must be a power of two of at least {_MIN_DOT}")
        self._precision = precision
        self._block_sources = block_sources

    def message_sums(
        self, features_XTS: Tensor, layers: Sequence[Layer], scale_DD: Tensor, gain_SD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernels.message_sums``."""
        _, num_targets, num_sources = features_XTS.shape
        hidden_TD, gained_TD = features_XTS.new_empty(2, num_targets, scale_DD.shape[0])
        arguments, constants = self._arguments(features_XTS, layers)
        _message_sums_kernel[(num_targets,)](
            *arguments,
            scale_DD.contiguous(),
            gain_SD.contiguous(),
            hidden_TD,
            gained_TD,
            num_targets,
            num_sources,
            **constants,
        )
        return hidden_TD, gained_TD

    def changes(self, features_XTS: Tensor, layers: Sequence[Layer], output: Affine) -> Tensor:
        """See ``Kernels.changes``."""
        _, num_targets, num_sources = features_XTS.shape
        num_elements = output.weight.shape[1]
        change_TSF = features_XTS.new_empty(num_targets, num_sources, num_elements)
        arguments, constants = self._arguments(features_XTS, layers)
        _changes_kernel[(num_targets, triton.cdiv(num_sources, self._block_sources))](
            *arguments,
            output.weight.T.contiguous(),
            output.bias.contiguous(),
            change_TSF,
            num_targets,
            num_sources,
            **constants,
            F=num_elements,
        )
        return change_TSF

    def _arguments(self, features_XTS: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], dict[str, Any]]:
        num_features, num_targets, num_sources = features_XTS.shape
        first, *later = layers
        dim = first.target_TD.shape[1]
        if dim < _MIN_DOT or dim & (dim - 1):
            raise ConfigError(f"hidden_dim is {dim}; Triton kernels need a power of two of at least {_MIN_DOT}")
        nothing = first.target_TD.new_zeros(1, dim).expand(num_sources, dim)
        sources = [nothing if layer.source_SD is None else layer.source_SD for layer in layers]
        arguments = [
            features_XTS.contiguous(),
            first.weight.contiguous(),
            torch.stack([layer.weight for layer in later]) if later else first.weight,
            torch.stack(sources),
            torch.stack([layer.target_TD.expand(num_targets, dim) for layer in layers]),
        ]
        constants = {
            "X": num_features,
            "X_PADDED": max(_MIN_DOT, triton.next_power_of_2(num_features)),
            "D": dim,
            "NUM_LAYERS": len(layers),
            "LAYERS_WITH_SOURCE": sum(1 << i for i, layer in enumerate(layers) if layer.source_SD is not None),
            "PRECISION": self._precision,
            "BLOCK_S": self._block_sources,
        }
        return arguments, constants
