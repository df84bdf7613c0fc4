"""Operations that look places up by their numbers: what is looked up along keeps its order."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sidecast.graphs.axes.calls import Axes, Call, aligned, broadcast
from sidecast.graphs.axes.dimensions import hold, unite


def _embedded(call: Call) -> list[Axes]:
    rows, columns = call.axes("weight")
    hold(rows)
    call.recording.use(call["weight"], "table", (rows,))
    return [[*call.axes("indices"), columns]]


def _indexed_axes(call: Call) -> Axes | None:
    """The axes of ``self[indices]``; None where an index is a mask."""
    axes, indices = call.axes("self"), list(call["indices"])
    indices += [None] * (len(axes) - len(indices))
    given = [number for number, index in enumerate(indices) if index is not None]
    tensors: list[Tensor] = [indices[number] for number in given]
    if any(not tensor.dtype.is_signed for tensor in tensors):
        return None
    for number in given:
        hold(axes[number])
    call.mix("self", given)
    shape: list[int] = []
    for tensor in tensors:
        sizes = [1] * (len(shape) - tensor.dim()) + list(tensor.shape)
        shape = [1] * (len(sizes) - len(shape)) + shape
        shape = [max(pair) if 0 not in pair else 0 for pair in zip(shape, sizes, strict=True)]
    found = broadcast(shape, map(call.axes, tensors))
    left = [axis for number, axis in enumerate(axes) if number not in given]
    is_together = given == list(range(given[0], given[-1] + 1))
    first = given[0] if is_together else 0
    return [*left[:first], *found, *left[first:]]


def _indexed(call: Call) -> list[Axes] | None:
    axes = _indexed_axes(call)
    return None if axes is None else [axes]


def _put(call: Call) -> list[Axes] | None:
    axes = _indexed_axes(call)
    if axes is None:
        return None
    values = call.axes("values")
    for number, value in aligned([axis.size for axis in axes], values):
        if value.size == axes[number].size:
            unite(axes[number], value)
    return [call.axes("self")]


def _looked_up_along(call: Call) -> list[Axes]:
    axes = call.axes("self")
    number = call.axis(len(axes))
    hold(axes[number])
    call.mix("self", (number,))
    axes[number] = call.axes("index")[0]
    return [axes]


def _added_along(call: Call) -> list[Axes]:
    axes, source = call.axes("self"), call.axes("source")
    number = call.axis(len(axes))
    hold(axes[number])
    call.mix("self", (number,))
    unite(source[number], call.axes("index")[0])
    for place, axis in enumerate(axes):
        if place != number:
            unite(axis, source[place])
    return [axes]


def _gathered(call: Call) -> list[Axes]:
    axes, index = call.axes("self"), call.axes("index")
    if not axes:
        return call.hold_all()
    number = call.axis(len(axes))
    hold(axes[number])
    call.mix("self", (number,))
    for place, axis in enumerate(index):
        if place != number:
            unite(axes[place], axis)
    return [index]


def _scattered(call: Call) -> list[Axes]:
    axes, index = call.axes("self"), call.axes("index")
    number = call.axis(len(axes))
    hold(axes[number])
    call.mix("self", (number,))
    source = call.get("src")
    all_axes = [axes, *([call.axes(source)] if isinstance(source, Tensor) else [])]
    for place, axis in enumerate(index):
        for other in all_axes if place != number else all_axes[1:]:
            unite(other[place], axis)
    return [axes]


INDEXING: dict[str, Callable[[Call], list[Axes] | None]] = {
    "embedding": _embedded,
    "index": _indexed,
    **dict.fromkeys(("index_put", "_index_put_impl"), _put),
    "index_select": _looked_up_along,
    **dict.fromkeys(("index_add", "index_copy"), _added_along),
    "gather": _gathered,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), _scattered),
}
