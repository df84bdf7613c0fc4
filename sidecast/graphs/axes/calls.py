"""One operation of a run: its arguments by name, and the dimensions of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from sidecast.graphs.axes.dimensions import Dimension, held, hold, unite

Axes = list[Dimension]
"""A tensor's axes, in order."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a parameter is used first.

    Attributes:
        kind: ``matrix``, ``table``, ``convolution``, ``scale`` or ``shift``.
        reads: Axes of it that are summed over or looked up, as dimensions.
    """

    kind: str
    reads: tuple[Dimension, ...] = ()


class Recording:
    """What is known of the tensors of a run.

    Attributes:
        uses: Of each parameter by name, in the order of the first uses.
        seen: The axes of every tensor that was made, each once; and those that are left of a tensor where an operation
            mixes places along its others.
        not_followed: Operations whose axes were held, because nothing is known of them.
    """

    def __init__(self) -> None:
        self.uses: dict[str, Use] = {}
        self.seen: dict[tuple[int, ...], tuple[Dimension, ...]] = {}
        self.not_followed: dict[str, None] = {}
        self._axes = WeakTensorKeyDictionary()
        self._origins = WeakTensorKeyDictionary()

    def axes(self, tensor: Tensor) -> Axes:
        """A tensor's axes; those of a constant are held, but where it is the same all along one of them."""
        axes = self._axes.get(tensor)
        if axes is None:
            axes = [
                Dimension(size) if size > 1 and _is_uniform(tensor, axis) else held(size)
                for axis, size in enumerate(tensor.shape)
            ]
            self._axes[tensor] = axes
        return list(axes)

    def set_axes(self, tensor: Tensor, axes: Sequence[Dimension]) -> None:
        self._axes[tensor] = list(axes)
        self.see(axes)

    def see(self, axes: Sequence[Dimension]) -> None:
        """Notes that there are places along these axes, without others."""
        self.seen.setdefault(tuple(map(id, axes)), tuple(axes))

    def origin(self, tensor: Tensor) -> str | None:
        """The parameter that a tensor is a view or a copy of; None if it is no parameter's."""
        name = self._origins.get(tensor)
        return name if isinstance(name, str) else None

    def set_origin(self, tensor: Tensor, name: str) -> None:
        self._origins[tensor] = name

    def use(self, tensor: Tensor, kind: str, reads: Iterable[Dimension] = ()) -> None:
        """Notes how a parameter is used, unless it was used before or the tensor is none."""
        name = self.origin(tensor)
        if name is not None and name not in self.uses:
            self.uses[name] = Use(kind=kind, reads=tuple(reads))


def _is_uniform(tensor: Tensor, axis: int) -> bool:
    if tensor.device.type == "meta" or tensor.is_complex() or not tensor.numel():
        return False
    try:
        return bool((tensor == tensor.narrow(axis, 0, 1)).all())
    except RuntimeError:
        # Some kinds of elements cannot be compared.
        return False


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of an operation.

    Attributes:
        name: The operation, without ``aten::`` and without the underscore of an operation in place.
        arguments: By the names of its schema, defaults included.
        outputs: The tensors that it gave.
        recording: What is known of tensors.
    """

    name: str
    arguments: dict[str, Any]
    outputs: list[Tensor]
    recording: Recording

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments."""
        return [leaf for leaf in tree_leaves(self.arguments) if isinstance(leaf, Tensor)]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        value = self.arguments.get(name)
        return default if value is None else value

    def axes(self, tensor: Tensor | str) -> Axes:
        """The axes of a tensor, or of the argument of that name."""
        return self.recording.axes(self.arguments[tensor] if isinstance(tensor, str) else tensor)

    def axis(self, rank: int, name: str = "dim") -> int:
        """The number of an axis, counted from the first."""
        return int(self.arguments[name]) % max(rank, 1)

    def axis_set(self, rank: int, name: str = "dim") -> set[int]:
        """Numbers of axes; of all of them if none is named."""
        value = self.arguments.get(name)
        if value is None or value == []:
            return set(range(rank))
        return {int(axis) % max(rank, 1) for axis in (value if isinstance(value, list | tuple) else [value])}

    def mix(self, tensor: Tensor | str, numbers: Iterable[int]) -> None:
        """Notes that places along some axes of a tensor are mixed: along the others, all of them move alike."""
        gone = set(numbers)
        self.recording.see([axis for number, axis in enumerate(self.axes(tensor)) if number not in gone])

    def hold_all(self) -> list[Axes]:
        """Holds every axis of every argument: whatever is done with them keeps their order."""
        for tensor in self.tensors:
            for axis in self.axes(tensor):
                hold(axis)
        return [[held(size) for size in output.shape] for output in self.outputs]


def aligned(shape: Sequence[int], axes: Axes) -> Iterator[tuple[int, Dimension]]:
    """Axes by the number of the axis of a broadcast shape that each lies on."""
    first = len(shape) - len(axes)
    return ((first + number, axis) for number, axis in enumerate(axes))


def broadcast(shape: Sequence[int], operands: Iterable[Axes]) -> Axes:
    """The axes of what is computed element by element; those of all operands that are as wide are united."""
    found: list[Dimension | None] = [None] * len(shape)
    for axes in operands:
        for number, axis in aligned(shape, axes):
            if axis.size != shape[number] or axis.size == 1:
                continue
            other = found[number]
            if other is None:
                found[number] = axis
            else:
                unite(other, axis)
    return [Dimension(size) if axis is None else axis for axis, size in zip(found, shape, strict=True)]
