"""The tile loops of a nowcast in compiled code, for CPUs; torch's operators stand in wherever it cannot run.

Shape suffixes: D hidden, X edge features, S source nodes, T target nodes, F kernel elements.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.predictors.nino.fusion import Affine
from sidecast.predictors.nino.kernels import CpuKernels, Kernels, Layer

logger = logging.getLogger(__name__)

_PANEL = 16
"""Columns of a weight that are packed together."""
_BF16_STRIP = 64
"""Columns whose sums the bf16 loops keep in registers."""
_MIN_SOURCES = 4
"""The compiled loops work on six sources of a target at once; with few of them (pairs have one), torch is faster."""


class _CompiledLayer(ctypes.Structure):
    """``SidecastLayer`` of nino_tiles.cpp, and ``SidecastBf16Layer`` of nino_tiles_bf16.cpp."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("source_SD", ctypes.c_void_p),
        ("target_TD", ctypes.c_void_p),
        ("target_stride", ctypes.c_int64),
    )


_searching = threading.Lock()


@dataclass(frozen=True)
class _Tiles:
    """The compiled loops of one precision.

    Attributes:
        message_sums: ``sidecast_..._message_sums``.
        changes: ``sidecast_..._changes``.
        scratch_bytes: ``sidecast_..._scratch_bytes``.
        pack: Lays out the weights of a layer, (K, D) fp32, as these loops read them; told whether it is the first.
        dim_step: Hidden widths are multiples of it.
    """

    message_sums: Any
    changes: Any
    scratch_bytes: Any
    pack: Callable[[Tensor, bool], Tensor]
    dim_step: int


def compiled_tiles() -> ctypes.CDLL | None:
    """The compiled loops, or None (with one warning in the log of the process) if they cannot run here."""
    # The first parts of a pass are begun on several threads at once: a cache alone would let each of them search.
    with _searching:
        return find_compiled_tiles()


@lru_cache(maxsize=1)
def find_compiled_tiles() -> ctypes.CDLL | None:
    """What ``compiled_tiles`` gives, for one thread at a time."""
    try:
        library = _load()
    except (OSError, AttributeError) as error:
        logger.warning("compiled tile loops are not to be had (%s); a nowcast on CPU will take longer", error)
        return None
    if not library.sidecast_runs_here():
        logger.warning("compiled tile loops need a processor with AVX2 and FMA; a nowcast on CPU will take longer")
        return None
    return library


def multiplies_bf16() -> bool:
    """Whether the compiled loops are here, and the processor multiplies bf16 (AVX-512 BF16)."""
    library = compiled_tiles()
    return library is not None and bool(library.sidecast_bf16_runs_here())


def _load() -> ctypes.CDLL:
    stem = Path(__file__).with_name("_nino_tiles")
    path = next((path for suffix in EXTENSION_SUFFIXES if (path := Path(f"{stem}{suffix}")).exists()), None)
    if path is None:
        raise OSError(f"there is no {stem}*.so: sidecast was installed without a C++ compiler")
    library = ctypes.CDLL(str(path))
    library.sidecast_runs_here.restype = library.sidecast_bf16_runs_here.restype = ctypes.c_int
    return library


@lru_cache(maxsize=2)
def _tiles(library: ctypes.CDLL, dtype: torch.dtype) -> _Tiles:
    prefix = "sidecast" if dtype == torch.float32 else "sidecast_bf16"
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    part: list[Any] = [pointer, size, size, size, ctypes.POINTER(_CompiledLayer), size, size]
    message_sums, changes, scratch_bytes = (
        getattr(library, f"{prefix}_{name}") for name in ("message_sums", "changes", "scratch_bytes")
    )
    scratch_bytes.argtypes, scratch_bytes.restype = [size], size
    message_sums.argtypes, message_sums.restype = [*part, *[pointer] * 5], None
    changes.argtypes, changes.restype = [*part, pointer, pointer, size, pointer, pointer], None
    if dtype == torch.float32:
        return _Tiles(message_sums, changes, scratch_bytes, _in_panels, _PANEL)
    return _Tiles(message_sums, changes, scratch_bytes, _in_bf16_pairs, _BF16_STRIP)


def cpu_kernels(product_dtype: torch.dtype) -> Kernels:
    """The fastest tile loops for a CPU; torch's operators for what the compiled ones, or the processor, cannot do."""
    if product_dtype == torch.float32 or (product_dtype == torch.bfloat16 and multiplies_bf16()):
        return CompiledKernels(product_dtype)
    return CpuKernels(product_dtype)


class CompiledKernels:
    """Tiles in compiled code. Python's lock is free meanwhile, so that threads do not wait for each other.

    Args:
        product_dtype: Precision of the D x D products, fp32 or bf16; everything else is fp32, but bf16 products go with
            a SiLU whose relative error is 2^-13.
    """

    def __init__(self, product_dtype: torch.dtype = torch.float32) -> None:
        self._dtype = product_dtype
        self._torch_kernels = CpuKernels(product_dtype)

    def message_sums(
        self, features_XTS: Tensor, layers: Sequence[Layer], scale_DD: Tensor, gain_SD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernels.message_sums``."""
        tiles, dim = self._tiles_for(features_XTS, scale_DD.shape[0]), scale_DD.shape[0]
        if tiles is None:
            return self._torch_kernels.message_sums(features_XTS, layers, scale_DD, gain_SD)
        call = _Call(tiles, features_XTS, layers)
        hidden_TD, gained_TD = torch.zeros(2, features_XTS.shape[1], dim)
        scale, gain = call.address(tiles.pack(scale_DD, False)), call.address(gain_SD)
        tiles.message_sums(*call.part, scale, gain, call.address(hidden_TD), call.address(gained_TD), call.scratch)
        return hidden_TD, gained_TD

    def changes(self, features_XTS: Tensor, layers: Sequence[Layer], output: Affine) -> Tensor:
        """See ``Kernels.changes``."""
        dim, num_elements = output.weight.shape
        tiles = self._tiles_for(features_XTS, dim)
        if tiles is None:
            return self._torch_kernels.changes(features_XTS, layers, output)
        call = _Call(tiles, features_XTS, layers)
        change_TSF = torch.empty(*features_XTS.shape[1:], num_elements)
        weight, bias = call.address(output.weight.T), call.address(output.bias)
        tiles.changes(*call.part, weight, bias, num_elements, call.address(change_TSF), call.scratch)
        return change_TSF

    def _tiles_for(self, features_XTS: Tensor, dim: int) -> _Tiles | None:
        """The loops, if they can do this."""
        library = compiled_tiles()
        if library is None or features_XTS.shape[2] < _MIN_SOURCES:
            return None
        tiles = _tiles(library, self._dtype)
        return tiles if dim % tiles.dim_step == 0 else None


class _Call:
    """Arguments of one call, and what keeps the memory that they point to.

    Attributes:
        part: The arguments that both functions begin with.
        scratch: Address of scratch memory.
    """

    def __init__(self, tiles: _Tiles, features_XTS: Tensor, layers: Sequence[Layer]) -> None:
        self._kept: list[Tensor] = []
        dim = layers[0].weight.shape[1]
        compiled = (_CompiledLayer * len(layers))()
        for depth, (slot, layer) in enumerate(zip(compiled, layers, strict=True)):
            slot.weight = self.address(tiles.pack(layer.weight, depth == 0))
            slot.source_SD = None if layer.source_SD is None else self.address(layer.source_SD)
            slot.target_TD = self.address(layer.target_TD)
            slot.target_stride = 0 if len(layer.target_TD) == 1 else dim
        self.part = (self.address(features_XTS), *features_XTS.shape, compiled, len(layers), dim)
        self.scratch = self.address(torch.empty(tiles.scratch_bytes(dim), dtype=torch.uint8))

    def address(self, tensor: Tensor) -> int:
        """Where the elements are; kept there until this call is gone."""
        assert tensor.dtype in (torch.float32, torch.bfloat16, torch.uint8)
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()


def _in_panels(weight_KD: Tensor, is_first: bool) -> Tensor:
    return weight_KD.unflatten(1, (-1, _PANEL)).transpose(0, 1).contiguous()


def _in_bf16_pairs(weight_KD: Tensor, is_first: bool) -> Tensor:
    if is_first:
        return weight_KD
    return weight_KD.bfloat16().unflatten(0, (-1, 2)).unflatten(2, (-1, _PANEL)).permute(2, 0, 3, 1).contiguous()
