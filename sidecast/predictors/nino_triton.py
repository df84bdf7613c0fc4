"""The two tile loops of a nowcast as Triton kernels, for tensors on a GPU.

A program takes a tile of targets and goes through sources one by one: what belongs to targets stays in registers, what
belongs to a source is one row that all targets share, and sums over sources need neither atomics nor exchange
between threads. So results are the same, bit for bit, in every run.

Under Triton's interpreter (``TRITON_INTERPRET=1`` before this module is imported) they run on CPU tensors.

Shape suffixes: C context, D hidden, X edge features, S source nodes, T target nodes, F kernel elements, L hidden
layers, G groups of sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from sidecast.errors import ConfigError
from sidecast.predictors.nino_fusion import Affine
from sidecast.predictors.nino_kernels import Layer

PRECISIONS = ("fp32", "tf32", "bf16")
_MIN_DOT = 16
"""Smallest side of a matrix product in Triton."""
_MAX_DIM = 128
"""Of wider hidden layers, the weights would not fit beside each other in the memory of a multiprocessor."""


@triton.jit
def _silu(x, PRECISION: tl.constexpr, COMPILED: tl.constexpr):  # type: ignore[no-untyped-def]
    if COMPILED and PRECISION != "ieee":
        # One instruction of the special-function unit, which would bound the kernel, instead of two.
        half = 0.5 * x
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        result = half + half * tanh
    else:
        result = x * tl.sigmoid(x)
    return result


@triton.jit
def _product(left, right, PRECISION: tl.constexpr, COMPILED: tl.constexpr):  # type: ignore[no-untyped-def]
    if PRECISION == "bf16":
        if COMPILED:
            result = tl.dot(left.to(tl.bfloat16), right)
        else:
            # The interpreter takes the bits of bf16 operands for integers.
            result = tl.dot(left.to(tl.bfloat16).to(tl.float32), right.to(tl.float32))
    else:
        result = tl.dot(left, right, input_precision=PRECISION)
    return result


@triton.jit
def _load_features(  # type: ignore[no-untyped-def]
    features_XST,
    source,
    targets,
    num_targets,
    num_sources,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    inputs = tl.arange(0, X_PADDED)
    present = (targets < num_targets)[:, None]
    plane = tl.cast(num_sources, tl.int64) * num_targets
    edges = features_XST + tl.cast(source, tl.int64) * num_targets + targets[:, None]
    if PRECISION == "bf16":
        # See _packed_weight. Changes are small beside the states: rounding those would drown them.
        column = inputs % (C + 2)
        newest = inputs // (C + 2) * C + C - 1
        read = newest - (C - 1) + tl.minimum(column, C - 1)
        mask = present & (inputs < X // C * (C + 2))[None, :]
        x = tl.load(edges + read[None, :] * plane, mask=mask, other=0.0)
        x -= tl.load(edges + newest[None, :] * plane, mask=mask & (column < C - 1)[None, :], other=0.0)
        x = tl.where((column == C)[None, :], x - x.to(tl.bfloat16).to(tl.float32), x)
    else:
        x = tl.load(edges + inputs[None, :] * plane, mask=present & (inputs < X)[None, :], other=0.0)
    return x


@triton.jit
def _load_layers(  # type: ignore[no-untyped-def]
    later_LDD,
    target_LTD,
    targets,
    num_targets,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_TARGET: tl.constexpr,
):
    columns = tl.arange(0, D)
    rows = tl.arange(0, D)
    # Triton knows no starred tuples.
    weights = ()
    addends = ()
    for layer in tl.static_range(NUM_LAYERS):
        if (LAYERS_WITH_TARGET >> layer) & 1:
            addend = target_LTD + (layer * num_targets + targets[:, None]) * D + columns[None, :]
            addends = addends + (tl.load(addend, mask=(targets < num_targets)[:, None], other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        else:
            addends = addends + (tl.load(target_LTD + layer * num_targets * D + columns)[None, :],)  # type: ignore[assignment]  # noqa: RUF005
        if layer > 0:
            weight = later_LDD + ((layer - 1) * D + rows[:, None]) * D + columns[None, :]
            weights = weights + (tl.load(weight),)  # type: ignore[assignment]  # noqa: RUF005
    return weights, addends


@triton.jit
def _hidden_tile(  # type: ignore[no-untyped-def]
    x,
    first,
    weights,
    addends,
    source_LSD,
    source,
    num_sources,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_SOURCE: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST_PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    columns = tl.arange(0, D)
    hidden = _product(x, first, FIRST_PRECISION, COMPILED)
    for layer in tl.static_range(NUM_LAYERS):
        if layer > 0:
            hidden = _product(hidden, weights[layer - 1], PRECISION, COMPILED)
        hidden += addends[layer]
        if (LAYERS_WITH_SOURCE >> layer) & 1:
            hidden += tl.load(source_LSD + (layer * num_sources + source) * D + columns)[None, :]
        hidden = _silu(hidden, PRECISION, COMPILED)
    return hidden


@triton.jit
def _message_sums_kernel(  # type: ignore[no-untyped-def]
    features_XST,
    first_XD,
    later_LDD,
    source_LSD,
    target_LTD,
    scale_DD,
    gain_SD,
    hidden_GTD,
    gained_GTD,
    num_targets,
    num_sources,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_SOURCE: tl.constexpr,
    LAYERS_WITH_TARGET: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST_PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_S: tl.constexpr,
):
    targets = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = tl.program_id(1) * GROUP_S
    columns = tl.arange(0, D)
    rows = tl.arange(0, D)
    inputs = tl.arange(0, X_PADDED)
    first = tl.load(first_XD + inputs[:, None] * D + columns[None, :])
    scale = tl.load(scale_DD + rows[:, None] * D + columns[None, :])
    weights, addends = _load_layers(later_LDD, target_LTD, targets, num_targets, D, NUM_LAYERS, LAYERS_WITH_TARGET)
    hidden_sum = tl.zeros((BLOCK_T, D), dtype=tl.float32)
    gained_sum = tl.zeros((BLOCK_T, D), dtype=tl.float32)
    for source in range(start, tl.minimum(start + GROUP_S, num_sources)):
        x = _load_features(features_XST, source, targets, num_targets, num_sources, X, X_PADDED, C, FIRST_PRECISION)
        hidden = _hidden_tile(
            x,
            first,
            weights,
            addends,
            source_LSD,
            source,
            num_sources,
            D,
            NUM_LAYERS,
            LAYERS_WITH_SOURCE,
            PRECISION,
            FIRST_PRECISION,
            COMPILED,
        )
        gain = tl.load(gain_SD + source * D + columns)
        hidden_sum += hidden
        gained_sum += _product(hidden, scale, PRECISION, COMPILED) * gain[None, :]
    group = tl.cast(tl.program_id(1), tl.int64) * num_targets
    place = (group + targets[:, None]) * D + columns[None, :]
    present = (targets < num_targets)[:, None]
    tl.store(hidden_GTD + place, hidden_sum, mask=present)
    tl.store(gained_GTD + place, gained_sum, mask=present)


@triton.jit
def _changes_kernel(  # type: ignore[no-untyped-def]
    features_XST,
    first_XD,
    later_LDD,
    source_LSD,
    target_LTD,
    output_FD,
    bias_F,
    change_FST,
    num_targets,
    num_sources,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_SOURCE: tl.constexpr,
    LAYERS_WITH_TARGET: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST_PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_S: tl.constexpr,
    F: tl.constexpr,
):
    targets = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = tl.program_id(1) * GROUP_S
    columns = tl.arange(0, D)
    inputs = tl.arange(0, X_PADDED)
    first = tl.load(first_XD + inputs[:, None] * D + columns[None, :])
    weights, addends = _load_layers(later_LDD, target_LTD, targets, num_targets, D, NUM_LAYERS, LAYERS_WITH_TARGET)
    for source in range(start, tl.minimum(start + GROUP_S, num_sources)):
        x = _load_features(features_XST, source, targets, num_targets, num_sources, X, X_PADDED, C, FIRST_PRECISION)
        hidden = _hidden_tile(
            x,
            first,
            weights,
            addends,
            source_LSD,
            source,
            num_sources,
            D,
            NUM_LAYERS,
            LAYERS_WITH_SOURCE,
            PRECISION,
            FIRST_PRECISION,
            COMPILED,
        )
        for element in tl.static_range(F):
            weight = tl.load(output_FD + element * D + columns)
            change = tl.sum(hidden * weight[None, :], axis=1) + tl.load(bias_F + element)
            row = tl.cast(element * num_sources + source, tl.int64) * num_targets
            tl.store(change_FST + row + targets, change, mask=targets < num_targets)


@dataclass(frozen=True, kw_only=True)
class TileShape:
    """How a kernel divides its work.

    Attributes:
        block_targets: Targets of one program, a power of two of at least 16; 64 is the height of a Hopper product.
        group_sources: Sources that one program goes through.
        num_warps: Warps of one program.
        num_stages: Stages of fetching features ahead.
    """

    block_targets: int = 64
    group_sources: int = 256
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        if self.block_targets < _MIN_DOT or self.block_targets & (self.block_targets - 1):
            raise ConfigError(
                f"block_targets is {self.block_targets}; it must be a power of two of at least {_MIN_DOT}"
            )
        if self.group_sources < 1:
            raise ConfigError(f"group_sources is {self.group_sources}; it must be at least 1")


# Chosen by what the compiler makes of them for Hopper: these fill the tensor cores' height with one warp group, which
# then needs no exchange between groups, and two programs fit on a multiprocessor; fp32 has no tensor cores, and spills
# registers with fewer threads.
_TENSOR_CORES = TileShape()
_FP32 = TileShape(block_targets=32, num_warps=16, num_stages=1)


class TritonKernels:
    """The tile loops as one kernel each; hidden vectors never leave the chip.

    Features are read along their targets, so they had better be contiguous there.

    Args:
        precision: Of the products: ``fp32``, ``tf32`` or ``bf16``; sums are fp32. SiLU uses the GPU's approximation of
            tanh, with an error of 2^-11, unless this is ``fp32``.
        context_len: C.
        shape: How work is divided; what suits the precision on a Hopper GPU if None.
    """

    def __init__(self, precision: str, context_len: int, shape: TileShape | None = None) -> None:
        if precision not in PRECISIONS:
            raise ConfigError(f"precision is {precision!r}; allowed: {', '.join(PRECISIONS)}")
        self._precision = precision
        self._context_len = context_len
        default = _FP32 if precision == "fp32" else _TENSOR_CORES
        self.shape = default if shape is None else shape

    def message_sums(
        self, features_XTS: Tensor, layers: Sequence[Layer], scale_DD: Tensor, gain_SD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernels.message_sums``."""
        _, num_targets, num_sources = features_XTS.shape
        grid = self._grid(num_targets, num_sources)
        hidden_GTD, gained_GTD = features_XTS.new_empty(2, grid[1], num_targets, scale_DD.shape[0])
        arguments, constants = self._arguments(features_XTS, layers)
        _message_sums_kernel[grid](
            *arguments,
            self._rounded(scale_DD),
            gain_SD.contiguous(),
            hidden_GTD,
            gained_GTD,
            num_targets,
            num_sources,
            **constants,
        )
        return hidden_GTD.sum(0), gained_GTD.sum(0)

    def changes(self, features_XTS: Tensor, layers: Sequence[Layer], output: Affine) -> Tensor:
        """See ``Kernels.changes``."""
        _, num_targets, num_sources = features_XTS.shape
        num_elements = output.weight.shape[1]
        change_FST = features_XTS.new_empty(num_elements, num_sources, num_targets)
        arguments, constants = self._arguments(features_XTS, layers)
        _changes_kernel[self._grid(num_targets, num_sources)](
            *arguments,
            output.weight.T.contiguous(),
            output.bias.contiguous(),
            change_FST,
            num_targets,
            num_sources,
            **constants,
            F=num_elements,
        )
        return change_FST.permute(2, 1, 0)

    def _grid(self, num_targets: int, num_sources: int) -> tuple[int, int]:
        shape = self.shape
        return triton.cdiv(num_targets, shape.block_targets), triton.cdiv(num_sources, shape.group_sources)

    def _rounded(self, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16 if self._precision == "bf16" else torch.float32).contiguous()

    def _arguments(self, features_XTS: Tensor, layers: Sequence[Layer]) -> tuple[list[Tensor], dict[str, Any]]:
        num_features, num_targets, num_sources = features_XTS.shape
        first, *later = layers
        dim = first.target_TD.shape[1]
        if not _MIN_DOT <= dim <= _MAX_DIM or dim & (dim - 1):
            raise ConfigError(f"hidden_dim is {dim}; Triton kernels need a power of two, {_MIN_DOT} to {_MAX_DIM}")
        nothing = first.target_TD.new_zeros(1, dim).expand(num_sources, dim)
        sources = [nothing if layer.source_SD is None else layer.source_SD for layer in layers]
        first_XD = first.weight
        if self._precision == "bf16":
            first_XD = _packed_weight(first_XD, self._context_len)
        padded = max(_MIN_DOT, triton.next_power_of_2(len(first_XD)))
        arguments = [
            features_XTS.transpose(1, 2).contiguous(),
            self._rounded(pad(first_XD, (0, 0, 0, padded - len(first_XD)))),
            self._rounded(torch.stack([layer.weight for layer in later]) if later else first_XD),
            torch.stack(sources),
            torch.stack([layer.target_TD.expand(num_targets, dim) for layer in layers]),
        ]
        constants = {
            "X": num_features,
            "X_PADDED": padded,
            "C": self._context_len,
            "D": dim,
            "NUM_LAYERS": len(layers),
            "LAYERS_WITH_SOURCE": sum(1 << i for i, layer in enumerate(layers) if layer.source_SD is not None),
            "LAYERS_WITH_TARGET": sum(1 << i for i, layer in enumerate(layers) if len(layer.target_TD) > 1),
            **precision_constants(self._precision),
            "COMPILED": features_XTS.is_cuda,
            "BLOCK_T": self.shape.block_targets,
            "GROUP_S": self.shape.group_sources,
            "num_warps": self.shape.num_warps,
            "num_stages": self.shape.num_stages,
        }
        return arguments, constants


def precision_constants(precision: str) -> dict[str, Any]:
    """How the kernels multiply in a precision."""
    # Edge features are few: their product is cheap, and its rounding would reach every sum.
    first = {"fp32": "ieee", "tf32": "tf32x3", "bf16": "bf16"}[precision]
    return {"PRECISION": "ieee" if precision == "fp32" else precision, "FIRST_PRECISION": first}


def _packed_weight(weight_XD: Tensor, context_len: int) -> Tensor:
    """First-layer weights for features that are packed so that bf16 products lose little.

    The C states of a kernel element become C - 1 differences to the newest one, and three columns whose products add up
    to that of the newest: high part x high part, low x high and high x low.
    """
    weight_FCD = weight_XD.unflatten(0, (-1, context_len))
    newest_FD = weight_FCD.sum(1)
    high_FD = newest_FD.to(torch.bfloat16).float()
    newest_F3D = torch.stack([high_FD, high_FD, newest_FD - high_FD], dim=1)
    return torch.cat([weight_FCD[:, :-1], newest_F3D], dim=1).flatten(0, 1)
