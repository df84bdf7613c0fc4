"""The tile loops of a nowcast in compiled code, for CPUs; torch's operators stand in wherever it cannot run.

Shape suffixes: D hidden, X edge features, S source nodes, T target nodes, F kernel elements.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.predictors.nino_fusion import Affine
from sidecast.predictors.nino_kernels import CpuKernels, Kernels, Layer

logger = logging.getLogger(__name__)

_PANEL = 16
"""Columns of a weight that are packed together."""
_MIN_SOURCES = 4
"""The compiled loops work on six sources of a target at once; with few of them (pairs have one), torch is faster."""


class _CompiledLayer(ctypes.Structure):
    """``SidecastLayer`` of nino_tiles.cpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("source_SD", ctypes.c_void_p),
        ("target_TD", ctypes.c_void_p),
        ("target_stride", ctypes.c_int64),
    )


@lru_cache(maxsize=1)
def compiled_tiles() -> ctypes.CDLL | None:
    """The compiled loops, or None (with one warning in the log of the process) if they cannot run here."""
    try:
        library = _load()
    except (OSError, AttributeError) as error:
        logger.warning("compiled tile loops are not to be had (%s); a nowcast on CPU will take longer", error)
        return None
    if not library.sidecast_runs_here():
        logger.warning("compiled tile loops need a processor with AVX2 and FMA; a nowcast on CPU will take longer")
        return None
    return library


def _load() -> ctypes.CDLL:
    stem = Path(__file__).with_name("_nino_tiles")
    path = next((path for suffix in EXTENSION_SUFFIXES if (path := Path(f"{stem}{suffix}")).exists()), None)
    if path is None:
        raise OSError(f"there is no {stem}*.so: sidecast was installed without a C++ compiler")
    library = ctypes.CDLL(str(path))
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    part: list[Any] = [pointer, size, size, size, ctypes.POINTER(_CompiledLayer), size, size]
    library.sidecast_runs_here.restype = ctypes.c_int
    library.sidecast_scratch_bytes.argtypes, library.sidecast_scratch_bytes.restype = [size], size
    library.sidecast_message_sums.argtypes, library.sidecast_message_sums.restype = [*part, *[pointer] * 5], None
    library.sidecast_changes.argtypes = [*part, pointer, pointer, size, pointer, pointer]
    library.sidecast_changes.restype = None
    return library


def cpu_kernels(product_dtype: torch.dtype) -> Kernels:
    """The fastest tile loops for a CPU: compiled ones in fp32, torch's operators in other precisions."""
    return CompiledKernels() if product_dtype == torch.float32 else CpuKernels(product_dtype)


class CompiledKernels:
    """Tiles in compiled code, in fp32. Python's lock is free meanwhile, so that threads do not wait for each other."""

    def __init__(self) -> None:
        self._torch_kernels = CpuKernels()

    def message_sums(
        self, features_XTS: Tensor, layers: Sequence[Layer], scale_DD: Tensor, gain_SD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernels.message_sums``."""
        library, dim = compiled_tiles(), scale_DD.shape[0]
        if library is None or not _fits(features_XTS, dim):
            return self._torch_kernels.message_sums(features_XTS, layers, scale_DD, gain_SD)
        call = _Call(library, features_XTS, layers)
        hidden_TD, gained_TD = torch.zeros(2, features_XTS.shape[1], dim)
        scale, gain = call.address(_packed(scale_DD)), call.address(gain_SD)
        library.sidecast_message_sums(
            *call.part, scale, gain, call.address(hidden_TD), call.address(gained_TD), call.scratch
        )
        return hidden_TD, gained_TD

    def changes(self, features_XTS: Tensor, layers: Sequence[Layer], output: Affine) -> Tensor:
        """See ``Kernels.changes``."""
        library, (dim, num_elements) = compiled_tiles(), output.weight.shape
        if library is None or not _fits(features_XTS, dim):
            return self._torch_kernels.changes(features_XTS, layers, output)
        call = _Call(library, features_XTS, layers)
        change_TSF = torch.empty(*features_XTS.shape[1:], num_elements)
        weight, bias = call.address(output.weight.T), call.address(output.bias)
        library.sidecast_changes(*call.part, weight, bias, num_elements, call.address(change_TSF), call.scratch)
        return change_TSF


class _Call:
    """Arguments of one call, and what keeps the memory that they point to.

    Attributes:
        part: The arguments that both functions begin with.
        scratch: Address of scratch memory.
    """

    def __init__(self, library: ctypes.CDLL, features_XTS: Tensor, layers: Sequence[Layer]) -> None:
        self._kept: list[Tensor] = []
        dim = layers[0].weight.shape[1]
        compiled = (_CompiledLayer * len(layers))()
        for slot, layer in zip(compiled, layers, strict=True):
            slot.weight = self.address(_packed(layer.weight))
            slot.source_SD = None if layer.source_SD is None else self.address(layer.source_SD)
            slot.target_TD = self.address(layer.target_TD)
            slot.target_stride = 0 if len(layer.target_TD) == 1 else dim
        self.part = (self.address(features_XTS), *features_XTS.shape, compiled, len(layers), dim)
        self.scratch = self.address(torch.empty(library.sidecast_scratch_bytes(dim), dtype=torch.uint8))

    def address(self, tensor: Tensor) -> int:
        """Where the elements are; kept there until this call is gone."""
        assert tensor.dtype in (torch.float32, torch.uint8)
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


def _fits(features_XTS: Tensor, dim: int) -> bool:
    return dim % _PANEL == 0 and features_XTS.shape[2] >= _MIN_SOURCES


def _packed(weight_KD: Tensor) -> Tensor:
    return weight_KD.unflatten(1, (-1, _PANEL)).transpose(0, 1).contiguous()
