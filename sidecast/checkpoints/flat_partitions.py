"""Flat vectors of fp32 masters that lie in pieces on the ranks, read by element range."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import ceil, prod
from pathlib import Path

import torch
from torch import Tensor

from sidecast.checkpoints.checkpoint import StoredTensor
from sidecast.errors import ConfigError

NUM_COMPARED_ELEMENTS = 4096
"""Elements of each parameter that are compared: enough to tell parameters apart without reading a large model twice."""
_LARGEST_SHARE = 0.1
_SMALLEST_VALUE = 1e-6  # what fp16 rounds to 0 is smaller

Shapes = Mapping[str, tuple[int, ...]]


class Concatenation:
    """Flat tensors one after the other, read by element range without joining them all.

    Args:
        parts: At least one; all of one dtype.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self._parts = [part.reshape(-1) for part in parts]
        self._bounds = [0]
        for part in self._parts:
            self._bounds.append(self._bounds[-1] + part.numel())

    @property
    def dtype(self) -> torch.dtype:
        return self._parts[0].dtype

    @property
    def num_elements(self) -> int:
        return self._bounds[-1]

    def read(self, start: int, stop: int) -> Tensor:
        """The elements of a range."""
        pieces = [
            part[max(start - low, 0) : stop - low]
            for part, (low, high) in zip(self._parts, pairwise(self._bounds), strict=True)
            if low < stop and high > start
        ]
        return torch.cat(pieces) if pieces else self._parts[0][:0]


def concatenated(
    path: Path, shapes: Shapes, partitions: Sequence[Tensor], paddings: Sequence[int], module: Mapping[str, Tensor]
) -> dict[str, StoredTensor]:
    """Stages 1, 2 and BF16_Optimizer: one flat vector per group, cut into the ranks' partitions.

    Args:
        path: The folder, for messages.
        shapes: Of the group's parameters, in the vector's order.
        partitions: The ranks' parts of the vector.
        paddings: Elements after each parameter.
        module: The weights that the model computes with, which its masters round to.

    Raises:
        ConfigError: The vector has fewer elements than the parameters, or more than they and its alignment take; or
            masters are not those of the module's weights.
    """
    vector = Concatenation(partitions)
    masters = {}
    start = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        stop = start + prod(shape)
        _check_holds(path, vector, name, stop)
        masters[name] = _master(shape, vector.dtype, partial(vector.read, start, stop))
        if name in module:
            check_masters(path, name, vector.read(start, min(stop, start + NUM_COMPARED_ELEMENTS)), module[name])
        start = stop + padding
    # DeepSpeed aligns what a rank holds to two elements for each rank, in some versions twice.
    alignment = 2 * len(partitions)
    if ceil(start / alignment) != ceil(vector.num_elements / alignment):
        raise _left_over(path, vector.num_elements, start, shapes)
    return masters


def evenly_split(path: Path, shapes: Shapes, vectors: Sequence[Concatenation]) -> dict[str, StoredTensor]:
    """Stage 3: a piece of every parameter on every rank.

    Args:
        path: The folder, for messages.
        shapes: Of all parameters, in the vectors' order.
        vectors: Each rank's pieces.

    Raises:
        ConfigError: A rank has fewer or more elements than its pieces.
    """
    masters = {}
    start = 0
    for name, shape in shapes.items():
        numel = prod(shape)
        stop = start + ceil(numel / len(vectors))
        for vector in vectors:
            _check_holds(path, vector, name, stop)

        def read(start: int = start, stop: int = stop, numel: int = numel) -> Tensor:
            return torch.cat([vector.read(start, stop) for vector in vectors])[:numel]

        masters[name] = _master(shape, vectors[0].dtype, read)
        start = stop
    for vector in vectors:
        if vector.num_elements != start:
            raise _left_over(path, vector.num_elements, start, shapes)
    return masters


def check_masters(path: Path, name: str, masters: Tensor, weights: Tensor) -> None:
    """Checks that masters are those of a parameter, and not of another or of another step.

    Args:
        path: The folder, for messages.
        name: The parameter's.
        masters: Its first elements, flat.
        weights: The parameter as the model computes with it, in any shape and precision.

    Raises:
        ConfigError: They differ by more than rounding, or a few steps of training, can account for.
    """
    rounded = weights.reshape(-1)[: masters.numel()].double()
    distance, norm = torch.linalg.vector_norm(masters.double() - rounded), torch.linalg.vector_norm(rounded)
    if bool(distance > _LARGEST_SHARE * norm + _SMALLEST_VALUE * masters.numel() ** 0.5):
        raise ConfigError(
            f"{path}: the fp32 masters of parameter {name!r} differ from its weights in the module by "
            f"{float(distance / norm):.0%}; they are another parameter's or of another step "
            f"(ds_to_universal exchanges some after round_robin_gradients)"
        )


def _master(shape: tuple[int, ...], dtype: torch.dtype, read_flat: Callable[[], Tensor]) -> StoredTensor:
    return StoredTensor(shape=shape, dtype=dtype, trainable=0 not in shape, read=lambda: read_flat().view(shape))


def _check_holds(path: Path, vector: Concatenation, name: str, stop: int) -> None:
    if stop > vector.num_elements:
        raise ConfigError(
            f"{path}: the optimizer files hold {vector.num_elements} elements where parameter {name!r} ends at {stop}"
        )


def _left_over(path: Path, num_elements: int, num_used: int, shapes: Shapes) -> ConfigError:
    return ConfigError(
        f"{path}: the optimizer files hold {num_elements} elements, of which the {len(shapes)} parameters of "
        f"'param_shapes' take {num_used}; files of two runs, or a parameter that is missing"
    )
