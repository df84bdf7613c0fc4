"""The compiled tile loops of a nowcast on a CPU: which there are, and which of them this processor can run.

Shape suffixes: K inputs of a layer, D hidden.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

TORCH_LOOPS = "torch"
"""The name of loops in torch's operators, which run everywhere."""

_PANEL = 16
"""Columns of a weight that are packed together."""
_BF16_STRIP = 64
"""Columns whose sums the bf16 loops keep in registers."""


class CompiledLayer(ctypes.Structure):
    """``SidecastLayer`` of layer.h."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("source_SD", ctypes.c_void_p),
        ("target_TD", ctypes.c_void_p),
        ("target_stride", ctypes.c_int64),
    )


@dataclass(frozen=True, kw_only=True)
class LoopsKind:
    """What is known of some loops wherever they are compiled.

    Attributes:
        needs: What they need, for messages.
        dtype: Precision of the D x D products.
        dim_step: Hidden widths are multiples of it.
        pack: Lays out the weights of a layer, (K, D) fp32, as these loops read them; told whether it is the first.
    """

    needs: str
    dtype: torch.dtype
    dim_step: int
    pack: Callable[[Tensor, bool], Tensor]


def _in_panels(weight_KD: Tensor, is_first: bool) -> Tensor:
    return weight_KD.unflatten(1, (-1, _PANEL)).transpose(0, 1).contiguous()


def _in_bf16_pairs(weight_KD: Tensor, is_first: bool) -> Tensor:
    if is_first:
        return weight_KD.contiguous()
    return weight_KD.bfloat16().unflatten(0, (-1, 2)).unflatten(2, (-1, _PANEL)).permute(2, 0, 3, 1).contiguous()


def _fp32(needs: str) -> LoopsKind:
    return LoopsKind(needs=needs, dtype=torch.float32, dim_step=_PANEL, pack=_in_panels)


def _bf16(needs: str) -> LoopsKind:
    return LoopsKind(needs=needs, dtype=torch.bfloat16, dim_step=_BF16_STRIP, pack=_in_bf16_pairs)


LOOPS: Mapping[str, LoopsKind] = MappingProxyType(
    {
        "amx": _bf16("a processor with AMX and AVX-512 BF16, and Linux"),
        "avx512_bf16": _bf16("a processor with AVX-512 BF16"),
        "avx512": _fp32("a processor with AVX-512 (F, BW, DQ, VL)"),
        "avx2": _fp32("a processor with AVX2 and FMA"),
        "portable": _fp32("a processor that is not x86"),
    }
)
"""All compiled loops, the fastest first. Each is the fastest of its precision where it runs."""


@dataclass(frozen=True)
class Loops:
    """Compiled loops that run here.

    Attributes:
        name: What settings call them.
        kind: What they are.
        message_sums: ``sidecast_..._message_sums``.
        changes: ``sidecast_..._changes``.
        scratch_bytes: ``sidecast_..._scratch_bytes``.
    """

    name: str
    kind: LoopsKind
    message_sums: Any
    changes: Any
    scratch_bytes: Any


_searching = threading.Lock()


def compiled_loops() -> Mapping[str, Loops]:
    """The compiled loops that run here, the fastest first. If there are none, the log of the process says so once."""
    # The first parts of a pass are begun on several threads at once: a cache alone would let each of them search.
    with _searching:
        return find_compiled_loops()


@lru_cache(maxsize=1)
def find_compiled_loops() -> Mapping[str, Loops]:
    """What ``compiled_loops`` gives, for one thread at a time."""
    try:
        library = _load()
        found = {name: _loops(library, name, kind) for name, kind in LOOPS.items() if _runs_here(library, name)}
    except (OSError, AttributeError) as error:
        logger.warning("compiled tile loops are not to be had (%s); a nowcast on CPU will take longer", error)
        return {}
    if not found:
        logger.warning("compiled tile loops need a processor with AVX2 and FMA; a nowcast on CPU will take longer")
    return MappingProxyType(found)


def load_problem() -> str | None:
    """Why there are no compiled loops to be had on any processor; None if they are installed."""
    try:
        _load()
    except OSError as error:
        return str(error)
    return None


def _load() -> ctypes.CDLL:
    stem = Path(__file__).with_name("_nino_tiles")
    path = next((path for suffix in EXTENSION_SUFFIXES if (path := Path(f"{stem}{suffix}")).exists()), None)
    if path is None:
        raise OSError(f"there is no {stem}*.so: sidecast was installed without a C++ compiler")
    return ctypes.CDLL(str(path))


def _runs_here(library: ctypes.CDLL, name: str) -> bool:
    return bool(getattr(library, f"sidecast_{name}_runs_here")())


def _loops(library: ctypes.CDLL, name: str, kind: LoopsKind) -> Loops:
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    part: list[Any] = [pointer, size, size, size, ctypes.POINTER(CompiledLayer), size, size]
    message_sums, changes, scratch_bytes = (
        getattr(library, f"sidecast_{name}_{function}") for function in ("message_sums", "changes", "scratch_bytes")
    )
    scratch_bytes.argtypes, scratch_bytes.restype = [size], size
    message_sums.argtypes, message_sums.restype = [*part, *[pointer] * 5], None
    changes.argtypes, changes.restype = [*part, pointer, pointer, size, pointer, pointer], None
    return Loops(name, kind, message_sums, changes, scratch_bytes)
