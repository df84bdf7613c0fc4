"""Losses and gradients of small Llamas on a CPU, by a compiled loop over sequences.

A small model's time on a CPU is not spent in matrix products but on the way to memory, and between operators: fresh
pages for every result, passes over tensors that have left the caches, some 500 calls. The compiled loop keeps one
sequence's activations and one member's weights in the core's own cache.

Shape suffixes: M members, P elements of the parameter vector, B sequences, L tokens of a sequence.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sidecast.evaluation.models.llama import Llama
from sidecast.evaluation.native.compiling import compiled

SOURCE = Path(__file__).with_name("llama_gradient.cpp")
TILE = 16
MAX_LAYERS = 64


class _Dims(ctypes.Structure):
    """The mirror of ``Dims`` in memory.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("vocab", "width", "hidden", "layers", "heads", "kv_heads", "head_dim")),
        ("sequences", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("rope_theta", ctypes.c_double),
        ("eps", ctypes.c_double),
    )


class NativeLlamaGradients:
    """Implements ``Gradients`` in fp32.

    Args:
        model: One that ``fits``.
        library: What ``llama_gradient.cpp`` was compiled to.
    """

    def __init__(self, model: Llama, library: ctypes.CDLL) -> None:
        self._config = model.config
        self._library = library
        library.llama_workspace_floats.restype = ctypes.c_int64
        library.llama_gradient.restype = library.llama_loss.restype = ctypes.c_double
        self._workspace = torch.empty(0)

    def __call__(self, params_MP: Tensor, tokens_BL: Tensor, targets_BL: Tensor, out_MP: Tensor) -> Tensor:
        """See ``Gradients``."""
        rows = zip(params_MP, out_MP, strict=True)
        losses = [self._run(self._library.llama_gradient, row[0], tokens_BL, targets_BL, row[1]) for row in rows]
        return torch.tensor(losses, dtype=torch.float32)

    def losses(self, params_MP: Tensor, tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """See ``Gradients``."""
        losses = [self._run(self._library.llama_loss, params_P, tokens_BL, targets_BL) for params_P in params_MP]
        return torch.tensor(losses, dtype=torch.float32)

    def _run(self, function: Callable[..., float], *tensors: Tensor) -> float:
        """Calls a compiled function with parameters, inputs, targets, and what it writes to, if anything."""
        num_sequences, length = tensors[1].shape
        dims = self._dims(num_sequences, length)
        num_floats = self._library.llama_workspace_floats(ctypes.byref(dims))
        if len(self._workspace) != num_floats:
            self._workspace = torch.empty(num_floats, dtype=torch.float32)
        for tensor, dtype in zip(tensors, (torch.float32, torch.int64, torch.int64, torch.float32), strict=False):
            # The compiled code believes what it is told.
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
            assert tensor.device.type == "cpu"
        addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, self._workspace)]
        return function(ctypes.byref(dims), *addresses)

    def _dims(self, num_sequences: int, length: int) -> _Dims:
        config = self._config
        return _Dims(
            config.vocab_size,
            config.width,
            config.hidden_width,
            config.num_layers,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            num_sequences,
            length,
            config.rope_theta,
            config.rms_eps,
        )


def fits(model: object, length: int) -> bool:
    """Whether the compiled loop can do a model and a length of sequences: all sizes in whole tiles."""
    if not isinstance(model, Llama):
        return False
    config = model.config
    sizes = (config.vocab_size, config.width, config.hidden_width, config.head_dim, length)
    return config.num_layers <= MAX_LAYERS and not any(size % TILE for size in sizes)


def native_gradients(model: object, length: int, folder: Path) -> NativeLlamaGradients | None:
    """The compiled loop; None where it does not fit or cannot be compiled.

    Args:
        model: The model.
        length: L, of all sequences.
        folder: Where compiled libraries are kept.
    """
    if not isinstance(model, Llama) or not fits(model, length):
        return None
    library = compiled(SOURCE, folder)
    return None if library is None else NativeLlamaGradients(model, library)
