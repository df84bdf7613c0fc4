"""What is known of operations: which axes of their arguments the axes of their results are.

An operation that is missing here, and does not work element by element, holds all axes that it is given: graphs lose
symmetries by it and never gain one.

Shape suffixes are not used: tensors are axes here, and axes have dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

from torch import Tensor

from sidecast.graphs.axes.calls import Axes, Call, broadcast
from sidecast.graphs.axes.dimensions import Dimension, cut, factorised, held, hold, unite
from sidecast.graphs.axes.indexing import INDEXING
from sidecast.graphs.axes.views import VIEWS

Follow = Callable[[Call], list[Axes] | None]

_SCALING = {"mul", "div"}


def follow_elementwise(call: Call) -> list[Axes] | None:
    """Places stay where they are, whatever is computed at each of them."""
    tensors = [tensor for tensor in call.tensors if tensor.dim()]
    if not call.outputs:
        return []
    if len(tensors) > 1:
        for tensor in tensors:
            call.recording.use(tensor, "scale" if call.name in _SCALING else "shift")
    axes = broadcast(call.outputs[0].shape, map(call.axes, tensors))
    return [axes for _ in call.outputs]


def _made_alike(call: Call) -> list[Axes]:
    """A new tensor that has the same number everywhere, or none yet."""
    return [[Dimension(size) for size in output.shape] for output in call.outputs]


def _made_in_order(call: Call) -> list[Axes]:
    return [[held(size) for size in output.shape] for output in call.outputs]


def _reduced(call: Call) -> list[Axes]:
    """Sums, means and the like see what they run over as a set."""
    axes = call.axes("self")
    gone = call.axis_set(len(axes))
    keeps = bool(call.get("keepdim", False))
    left = [Dimension(1) if number in gone else axis for number, axis in enumerate(axes)]
    kept = left if keeps else [axis for number, axis in enumerate(axes) if number not in gone]
    return [kept for _ in call.outputs]


def _reduced_with_places(call: Call) -> list[Axes]:
    """Maxima along an axis say where they are, so its order counts."""
    axes = call.axes("self")
    if call.get("dim") is not None or call.name.startswith("arg"):
        for number in call.axis_set(len(axes)):
            hold(axes[number])
    return _reduced(call)


def _same(call: Call) -> list[Axes]:
    return [call.axes("self") for _ in call.outputs]


def _mixed(call: Call) -> list[Axes]:
    """What is divided by a sum along an axis sees that as a set, and keeps it."""
    axes = call.axes("self")
    if axes:
        call.mix("self", call.axis_set(len(axes)))
    return [list(axes) for _ in call.outputs]


def _running(call: Call) -> list[Axes]:
    """Running sums and the like go along an axis in its order."""
    axes = call.axes("self")
    numbers = call.axis_set(len(axes), "dims" if "dims" in call.arguments else "dim") if axes else set()
    for number in numbers:
        hold(axes[number])
    call.mix("self", numbers)
    return [list(axes) for _ in call.outputs]


def _in_order_along(call: Call, name: str) -> list[Axes]:
    """What is sorted, or chosen by size, has an order of its own."""
    axes = call.axes("self")
    if not axes:
        return [[] for _ in call.outputs]
    number = call.axis(len(axes), name)
    hold(axes[number])
    return [[*axes[:number], held(output.shape[number]), *axes[number + 1 :]] for output in call.outputs]


def _triangle(call: Call) -> list[Axes]:
    axes = call.axes("self")
    for axis in axes[-2:]:
        hold(axis)
    return [axes]


def _contract(call: Call, left: Tensor, right: Tensor) -> Axes:
    """Rows of one matrix by columns of another, or batches of them."""
    here, there = call.axes(left), call.axes(right)
    summed = there[-2] if len(there) > 1 else there[-1]
    unite(here[-1], summed)
    for one, other in zip(here[:-2], there[:-2], strict=False):
        unite(one, other)
    # What is made may be added to what is read, so that nothing else shows that the sum leaves the other axes.
    call.mix(left, (len(here) - 1,))
    call.mix(right, (max(len(there) - 2, 0),))
    for tensor in (left, right):
        call.recording.use(tensor, "matrix", (summed,))
    return [*here[:-1], *(there[-1:] if len(there) > 1 else ())]


def _multiplied(call: Call) -> list[Axes]:
    return [_contract(call, call["self"], call.get("mat2", call.get("vec", call.get("tensor"))))]


def _multiplied_and_added(call: Call) -> list[Axes]:
    names = next(pair for pair in (("mat1", "mat2"), ("batch1", "batch2"), ("mat", "vec")) if pair[0] in call.arguments)
    axes = _contract(call, call[names[0]], call[names[1]])
    call.recording.use(call["self"], "shift")
    return [broadcast(call.outputs[0].shape, (axes, call.axes("self")))]


def _normalised(call: Call) -> list[Axes]:
    """Norms over the last axes see them as sets and scale each place."""
    axes = call.axes("input")
    for name, kind in (("weight", "scale"), ("bias", "shift")):
        tensor = call.get(name)
        if tensor is not None:
            broadcast(call["input"].shape, (axes, call.axes(tensor)))
            call.recording.use(tensor, kind)
    rank = len(call["normalized_shape"])
    statistics = [*axes[: len(axes) - rank], *(Dimension(1) for _ in range(rank))]
    return [axes, *(statistics for _ in call.outputs[1:])]


def _normalised_channels(call: Call) -> list[Axes]:
    axes = call.axes("input")
    for name, kind in (("weight", "scale"), ("bias", "shift"), ("running_mean", ""), ("running_var", "")):
        tensor = call.get(name)
        if tensor is not None:
            unite(axes[1], call.axes(tensor)[0])
            if kind:
                call.recording.use(tensor, kind)
    return [axes, *([axes[1] if size == axes[1].size else held(size) for size in o.shape] for o in call.outputs[1:])]


def _normalised_groups(call: Call) -> list[Axes]:
    axes, num_groups = call.axes("input"), int(call["group"])
    for name, kind in (("weight", "scale"), ("bias", "shift")):
        tensor = call.get(name)
        if tensor is not None:
            unite(axes[1], call.axes(tensor)[0])
            call.recording.use(tensor, kind)
    group, _ = factorised(axes[1], (num_groups, axes[1].size // num_groups))
    return [axes, *([axes[0], group] for _ in call.outputs[1:])]


def _convolved(call: Call) -> list[Axes]:
    inputs, weights = call.axes("input"), call.axes("weight")
    num_groups = int(call["groups"])
    outer, inner = weights[:2]
    # Transposed ones keep their inputs first.
    summed, made = (outer, inner) if call["transposed"] else (inner, outer)
    for axis in (*inputs[2:], *weights[2:]):
        hold(axis)
    group, per_group = factorised(inputs[1], (num_groups, inputs[1].size // num_groups))
    outer_group, outer_rest = factorised(outer, (num_groups, outer.size // num_groups))
    unite(group, outer_group)
    unite(per_group, outer_rest if call["transposed"] else summed)
    call.mix("input", range(1, len(inputs)))
    outputs = _product(outer_group, inner) if call["transposed"] else made
    call.recording.use(call["weight"], "convolution", (per_group,))
    bias = call.get("bias")
    if bias is not None:
        unite(outputs, call.axes(bias)[0])
        call.recording.use(bias, "shift")
    return [[inputs[0], outputs, *(held(size) for size in call.outputs[0].shape[2:])]]


def _product(group: Dimension, rest: Dimension) -> Dimension:
    return rest if group.size == 1 else Dimension(group.size * rest.size, factors=(group, rest))


def _pooled(call: Call) -> list[Axes]:
    """Channels stay, places move."""
    axes = call.axes("self")
    num_kept = {1: 1, 2: 2}.get(len(axes) - 2, 2)
    for axis in axes[num_kept:]:
        hold(axis)
    call.mix("self", range(num_kept, len(axes)))
    return [[*axes[:num_kept], *(held(size) for size in output.shape[num_kept:])] for output in call.outputs]


def _attended(call: Call) -> list[Axes]:
    """Queries, keys and values of (..., heads, places, dimensions)."""
    query, key, value = (call.axes(name) for name in ("query", "key", "value"))
    for number, axis in enumerate(query[:-2]):
        unite(axis, key[number])
        unite(axis, value[number])
    unite(query[-1], key[-1])
    unite(key[-2], value[-2])
    if call.get("is_causal", False):
        hold(query[-2])
        hold(key[-2])
    mask = call.get("attn_mask", call.get("attn_bias"))
    if mask is not None:
        scores = [*query[:-1], key[-2]]
        broadcast([axis.size for axis in scores], (scores, call.axes(mask)))
        call.recording.use(mask, "shift")
    for name in ("query", "key"):
        call.mix(name, (len(query) - 1,))
    for name in ("key", "value"):
        call.mix(name, (len(query) - 2,))
    attended = [*query[:-1], value[-1]]
    # Some kernels round the places of their sums up, or give the state of their random numbers.
    others = (
        [
            axis if axis is not None and axis.size == size else held(size)
            for axis, size in zip_longest(query[:-1][: output.dim()], output.shape)
        ]
        for output in call.outputs[1:]
    )
    return [attended, *others]


def _gated(call: Call) -> list[Axes]:
    """One half of an axis gates the other."""
    axes = call.axes("self")
    number = call.axis(len(axes))
    half = axes[number].size // 2
    axes[number], gate = cut(axes[number], (half, half))
    unite(axes[number], gate)
    return [axes]


FOLLOWED: dict[str, Follow] = {
    **VIEWS,
    **INDEXING,
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), _made_alike),
    **dict.fromkeys(
        ("zeros_like", "ones_like", "full_like", "empty_like", "new_empty_strided", "empty_strided", "scalar_tensor"),
        _made_alike,
    ),
    **dict.fromkeys(("arange", "linspace", "eye", "rand", "randn", "lift_fresh"), _made_in_order),
    **dict.fromkeys(
        ("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "any", "all", "logsumexp"),
        _reduced,
    ),
    **dict.fromkeys(("linalg_vector_norm", "norm", "count_nonzero"), _reduced),
    **dict.fromkeys(("argmax", "argmin", "max", "min"), _reduced_with_places),
    **dict.fromkeys(("fill", "zero", "detach", "alias", "clone", "_to_copy"), _same),
    **dict.fromkeys(("_softmax", "_log_softmax"), _mixed),
    **dict.fromkeys(("cumsum", "cumprod", "logcumsumexp", "flip", "roll"), _running),
    **dict.fromkeys(("topk", "sort"), lambda call: _in_order_along(call, "dim")),
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("copy", "masked_fill", "where"), follow_elementwise),
    **dict.fromkeys(("mm", "bmm", "mv", "dot"), _multiplied),
    **dict.fromkeys(("addmm", "baddbmm", "addmv"), _multiplied_and_added),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _normalised),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training"), _normalised_channels),
    "native_group_norm": _normalised_groups,
    "convolution": _convolved,
    "glu": _gated,
    **dict.fromkeys(("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "upsample_nearest2d"), _pooled),
    **dict.fromkeys(
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention"), _attended
    ),
}
"""By the names of operations, without the underscore of those in place."""

KEEPS_ORIGIN = {*VIEWS, "detach", "alias", "clone", "_to_copy", "select", "index", "index_select"} - {"cat", "stack"}
"""Operations whose results are still the parameter that they are given."""
