"""Operations that rearrange axes: views, cuts, joins and repetitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from sidecast.graphs.axes.calls import Axes, Call
from sidecast.graphs.axes.dimensions import (
    Dimension,
    cut,
    factorised,
    held,
    hold,
    product_of,
    sequence_of,
    unite,
)


def _viewed(call: Call) -> list[Axes]:
    return [reshaped(call.axes("self"), output.shape) for output in call.outputs]


def reshaped(axes: Axes, shape: Sequence[int]) -> Axes:
    """The axes of the same elements in another shape."""
    if 0 in shape:
        return [held(size) for size in shape]
    found: Axes = []
    before = [axis for axis in axes if axis.size != 1][::-1]
    after = list(shape)
    while after:
        # The fewest axes of both shapes that have as many elements.
        group, sizes = [], [after.pop(0)]
        num_before, num_after = 1, sizes[0]
        while num_before != num_after:
            if num_before < num_after:
                group.append(before.pop())
                num_before *= group[-1].size
            else:
                sizes.append(after.pop(0))
                num_after *= sizes[-1]
        found += factorised(product_of(group), sizes) if group else [Dimension(1) for _ in sizes]
    return found


def _permuted(call: Call) -> list[Axes]:
    axes = call.axes("self")
    return [[axes[int(number)] for number in call["dims"]]]


def _transposed(call: Call) -> list[Axes]:
    axes = call.axes("self")
    if axes:
        one, other = call.axis(len(axes), "dim0"), call.axis(len(axes), "dim1")
        axes[one], axes[other] = axes[other], axes[one]
    return [axes]


def _turned(call: Call) -> list[Axes]:
    return [call.axes("self")[::-1]]


def _with_new_axis(call: Call) -> list[Axes]:
    axes = call.axes("self")
    axes.insert(call.axis(len(axes) + 1), Dimension(1))
    return [axes]


def _without_single_axes(call: Call) -> list[Axes]:
    axes = call.axes("self")
    gone = call.axis_set(len(axes)) if "dim" in call.arguments else set(range(len(axes)))
    return [[axis for number, axis in enumerate(axes) if axis.size != 1 or number not in gone]]


def _expanded(call: Call) -> list[Axes]:
    axes, shape = call.axes("self"), call.outputs[0].shape
    first = len(shape) - len(axes)
    # What is repeated is the same everywhere along its axis.
    return [
        [
            axes[number - first] if number >= first and axes[number - first].size == size else Dimension(size)
            for number, size in enumerate(shape)
        ]
    ]


def _repeated(call: Call) -> list[Axes]:
    axes, times = call.axes("self"), [int(count) for count in call["repeats"]]
    axes = [Dimension(1)] * (len(times) - len(axes)) + axes
    return [[product_of((Dimension(count), axis)) for count, axis in zip(times, axes, strict=True)]]


def _sliced(call: Call) -> list[Axes]:
    axes = call.axes("self")
    number, step = call.axis(len(axes)), int(call.get("step", 1))
    axis, num_left = axes[number], call.outputs[0].shape[number]
    first = int(call.get("start", 0))
    first = min(first + axis.size if first < 0 else first, axis.size)
    if num_left != axis.size:
        axes[number] = _slice_of(axis, max(first, 0), num_left, step)
    return [axes]


def _slice_of(axis: Dimension, first: int, num_left: int, step: int) -> Dimension:
    if step == 1:
        return cut(axis, (first, num_left, axis.size - first - num_left))[1]
    if axis.size == num_left * step and first < step:
        left, place = factorised(axis, (num_left, step))
        hold(place)
        return left
    hold(axis)
    return held(num_left)


def _selected(call: Call) -> list[Axes]:
    axes = call.axes("self")
    hold(axes.pop(call.axis(len(axes))))
    return [axes]


def _unbound(call: Call) -> list[Axes]:
    axes = call.axes("self")
    hold(axes.pop(call.axis(len(axes))))
    return [list(axes) for _ in call.outputs]


def _split(call: Call) -> list[Axes]:
    axes = call.axes("self")
    number = call.axis(len(axes))
    pieces = cut(axes[number], [output.shape[number] for output in call.outputs])
    return [[*axes[:number], piece, *axes[number + 1 :]] for piece in pieces]


def _joined(call: Call) -> list[Axes]:
    tensors: list[Tensor] = [tensor for tensor in call["tensors"] if tensor.dim() > 1 or tensor.numel()]
    if not tensors:
        return call.hold_all()
    all_axes = [call.axes(tensor) for tensor in tensors]
    number = call.axis(len(all_axes[0]))
    for axes in all_axes[1:]:
        for place, axis in enumerate(axes):
            if place != number:
                unite(all_axes[0][place], axis)
    joined = list(all_axes[0])
    joined[number] = sequence_of(axes[number] for axes in all_axes)
    return [joined]


def _stacked(call: Call) -> list[Axes]:
    all_axes = [call.axes(tensor) for tensor in call["tensors"]]
    for axes in all_axes[1:]:
        for one, other in zip(all_axes[0], axes, strict=True):
            unite(one, other)
    stacked = list(all_axes[0])
    stacked.insert(call.axis(len(stacked) + 1), held(len(all_axes)))
    return [stacked]


def _padded(call: Call) -> list[Axes]:
    axes, padding = call.axes("self"), [int(size) for size in call["pad"]]
    for place in range(len(padding) // 2):
        number = len(axes) - 1 - place
        axis, (before, after) = axes[number], padding[2 * place : 2 * place + 2]
        if before < 0 or after < 0:
            left = axis.size + min(before, 0) + min(after, 0)
            axis = cut(axis, (max(-before, 0), left, axis.size - left - max(-before, 0)))[1]
        axes[number] = sequence_of((Dimension(max(before, 0)), axis, Dimension(max(after, 0))))
    return [axes]


def _as_complex(call: Call) -> list[Axes]:
    axes = call.axes("self")
    hold(axes.pop())
    return [axes]


def _as_real(call: Call) -> list[Axes]:
    return [[*call.axes("self"), held(2)]]


VIEWS: dict[str, Callable[[Call], list[Axes] | None]] = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy"), _viewed),
    "permute": _permuted,
    "transpose": _transposed,
    "t": _turned,
    "unsqueeze": _with_new_axis,
    "squeeze": _without_single_axes,
    "expand": _expanded,
    "repeat": _repeated,
    "slice": _sliced,
    "select": _selected,
    "unbind": _unbound,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk"), _split),
    "cat": _joined,
    "stack": _stacked,
    "constant_pad_nd": _padded,
    "view_as_complex": _as_complex,
    "view_as_real": _as_real,
}
