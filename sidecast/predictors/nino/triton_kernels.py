"""Launches the Triton kernels of ``triton_tiles`` on the tensors of a GPU: operands, precisions, tile shapes.

Shape suffixes: C context, D hidden, X edge features, S source nodes, T target nodes, F kernel elements, G groups of
sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from sidecast.errors import ConfigError
from sidecast.predictors.nino.fusion import Affine
from sidecast.predictors.nino.kernels import Layer
from sidecast.predictors.nino.triton_tiles import changes_kernel, message_sums_kernel

PRECISIONS = ("fp32", "tf32", "bf16")
_MIN_DOT = 16
"""Smallest side of a matrix product in Triton."""
_MAX_DIM = 128
"""Of wider hidden layers, the weights would not fit beside each other in the memory of a multiprocessor."""


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
        message_sums_kernel[grid](
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
        changes_kernel[self._grid(num_targets, num_sources)](
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
