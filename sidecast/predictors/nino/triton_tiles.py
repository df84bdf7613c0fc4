"""The two tile loops of a nowcast as Triton kernels: what one program does on a GPU.

A program takes a tile of targets and goes through sources one by one: what belongs to targets stays in registers, what
belongs to a source is one row that all targets share, and sums over sources need neither atomics nor exchange
between threads. So results are the same, bit for bit, in every run.

Under Triton's interpreter (``TRITON_INTERPRET=1`` before this module is imported) they run on CPU tensors.

Shape suffixes: C context, D hidden, X edge features, S source nodes, T target nodes, F kernel elements, L hidden
layers, G groups of sources.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _silu(x, PRECISION: tl.constexpr, COMPILED: tl.constexpr):  # type: ignore[no-untyped-def]
    if COMPILED and PRECISION != "ieee":
        # One instruction of the special-function unit, which would bound the kernel, instead of two.
        half = 0.5 * x
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
        )
        result = half + half * tanh
    else:
        result = x * tl.sigmoid(x)
    return result


@triton.jit
def _product(left, right, PRECISION: tl.constexpr, COMPILED: tl.constexpr):  # type: ignore[no-untyped-def]
    if PRECISION == "bf16":
        if COMPILED:
            result = tl.dot(left.to(tl.bfloat16), right)
        else:
            # The interpreter takes the bits of bf16 operands for integers.
            result = tl.dot(left.to(tl.bfloat16).to(tl.float32), right.to(tl.float32))
    else:
        result = tl.dot(left, right, input_precision=PRECISION)
    return result


@triton.jit
def _load_features(  # type: ignore[no-untyped-def]
    features_XST,
    source,
    targets,
    num_targets,
    num_sources,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    inputs = tl.arange(0, X_PADDED)
    present = (targets < num_targets)[:, None]
    plane = tl.cast(num_sources, tl.int64) * num_targets
    edges = features_XST + tl.cast(source, tl.int64) * num_targets + targets[:, None]
    if PRECISION == "bf16":
        # See _packed_weight. Changes are small beside the states: rounding those would drown them.
        column = inputs % (C + 2)
        newest = inputs // (C + 2) * C + C - 1
        read = newest - (C - 1) + tl.minimum(column, C - 1)
        mask = present & (inputs < X // C * (C + 2))[None, :]
        x = tl.load(edges + read[None, :] * plane, mask=mask, other=0.0)
        x -= tl.load(edges + newest[None, :] * plane, mask=mask & (column < C - 1)[None, :], other=0.0)
        x = tl.where((column == C)[None, :], x - x.to(tl.bfloat16).to(tl.float32), x)
    else:
        x = tl.load(edges + inputs[None, :] * plane, mask=present & (inputs < X)[None, :], other=0.0)
    return x


@triton.jit
def _load_layers(  # type: ignore[no-untyped-def]
    later_LDD,
    target_LTD,
    targets,
    num_targets,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_TARGET: tl.constexpr,
):
    columns = tl.arange(0, D)
    rows = tl.arange(0, D)
    # Triton knows no starred tuples.
    weights = ()
    addends = ()
    for layer in tl.static_range(NUM_LAYERS):
        if (LAYERS_WITH_TARGET >> layer) & 1:
            addend = target_LTD + (layer * num_targets + targets[:, None]) * D + columns[None, :]
            addends = addends + (tl.load(addend, mask=(targets < num_targets)[:, None], other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
        else:
            addends = addends + (tl.load(target_LTD + layer * num_targets * D + columns)[None, :],)  # type: ignore[assignment]  # noqa: RUF005
        if layer > 0:
            weight = later_LDD + ((layer - 1) * D + rows[:, None]) * D + columns[None, :]
            weights = weights + (tl.load(weight),)  # type: ignore[assignment]  # noqa: RUF005
    return weights, addends


@triton.jit
def _hidden_tile(  # type: ignore[no-untyped-def]
    x,
    first,
    weights,
    addends,
    source_LSD,
    source,
    num_sources,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_SOURCE: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST_PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
):
    columns = tl.arange(0, D)
    hidden = _product(x, first, FIRST_PRECISION, COMPILED)
    for layer in tl.static_range(NUM_LAYERS):
        if layer > 0:
            hidden = _product(hidden, weights[layer - 1], PRECISION, COMPILED)
        hidden += addends[layer]
        if (LAYERS_WITH_SOURCE >> layer) & 1:
            hidden += tl.load(source_LSD + (layer * num_sources + source) * D + columns)[None, :]
        hidden = _silu(hidden, PRECISION, COMPILED)
    return hidden


@triton.jit
def message_sums_kernel(  # type: ignore[no-untyped-def]
    features_XST,
    first_XD,
    later_LDD,
    source_LSD,
    target_LTD,
    scale_DD,
    gain_SD,
    hidden_GTD,
    gained_GTD,
    num_targets,
    num_sources,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_SOURCE: tl.constexpr,
    LAYERS_WITH_TARGET: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST_PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_S: tl.constexpr,
):
    targets = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = tl.program_id(1) * GROUP_S
    columns = tl.arange(0, D)
    rows = tl.arange(0, D)
    inputs = tl.arange(0, X_PADDED)
    first = tl.load(first_XD + inputs[:, None] * D + columns[None, :])
    scale = tl.load(scale_DD + rows[:, None] * D + columns[None, :])
    weights, addends = _load_layers(later_LDD, target_LTD, targets, num_targets, D, NUM_LAYERS, LAYERS_WITH_TARGET)
    hidden_sum = tl.zeros((BLOCK_T, D), dtype=tl.float32)
    gained_sum = tl.zeros((BLOCK_T, D), dtype=tl.float32)
    for source in range(start, tl.minimum(start + GROUP_S, num_sources)):
        x = _load_features(features_XST, source, targets, num_targets, num_sources, X, X_PADDED, C, FIRST_PRECISION)
        hidden = _hidden_tile(
            x,
            first,
            weights,
            addends,
            source_LSD,
            source,
            num_sources,
            D,
            NUM_LAYERS,
            LAYERS_WITH_SOURCE,
            PRECISION,
            FIRST_PRECISION,
            COMPILED,
        )
        gain = tl.load(gain_SD + source * D + columns)
        hidden_sum += hidden
        gained_sum += _product(hidden, scale, PRECISION, COMPILED) * gain[None, :]
    group = tl.cast(tl.program_id(1), tl.int64) * num_targets
    place = (group + targets[:, None]) * D + columns[None, :]
    present = (targets < num_targets)[:, None]
    tl.store(hidden_GTD + place, hidden_sum, mask=present)
    tl.store(gained_GTD + place, gained_sum, mask=present)


@triton.jit
def changes_kernel(  # type: ignore[no-untyped-def]
    features_XST,
    first_XD,
    later_LDD,
    source_LSD,
    target_LTD,
    output_FD,
    bias_F,
    change_FST,
    num_targets,
    num_sources,
    X: tl.constexpr,
    X_PADDED: tl.constexpr,
    C: tl.constexpr,
    D: tl.constexpr,
    NUM_LAYERS: tl.constexpr,
    LAYERS_WITH_SOURCE: tl.constexpr,
    LAYERS_WITH_TARGET: tl.constexpr,
    PRECISION: tl.constexpr,
    FIRST_PRECISION: tl.constexpr,
    COMPILED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP_S: tl.constexpr,
    F: tl.constexpr,
):
    targets = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    start = tl.program_id(1) * GROUP_S
    columns = tl.arange(0, D)
    inputs = tl.arange(0, X_PADDED)
    first = tl.load(first_XD + inputs[:, None] * D + columns[None, :])
    weights, addends = _load_layers(later_LDD, target_LTD, targets, num_targets, D, NUM_LAYERS, LAYERS_WITH_TARGET)
    for source in range(start, tl.minimum(start + GROUP_S, num_sources)):
        x = _load_features(features_XST, source, targets, num_targets, num_sources, X, X_PADDED, C, FIRST_PRECISION)
        hidden = _hidden_tile(
            x,
            first,
            weights,
            addends,
            source_LSD,
            source,
            num_sources,
            D,
            NUM_LAYERS,
            LAYERS_WITH_SOURCE,
            PRECISION,
            FIRST_PRECISION,
            COMPILED,
        )
        for element in tl.static_range(F):
            weight = tl.load(output_FD + element * D + columns)
            change = tl.sum(hidden * weight[None, :], axis=1) + tl.load(bias_F + element)
            row = tl.cast(element * num_sources + source, tl.int64) * num_targets
            tl.store(change_FST + row + targets, change, mask=targets < num_targets)
