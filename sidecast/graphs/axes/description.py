"""What was learned of a network's axes as plain JSON: whoever holds it can draw the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from torch import nn

from sidecast.graphs.axes.calls import Axes, Use
from sidecast.graphs.axes.dimensions import Dimension, Strided, hold, runs_of
from sidecast.graphs.axes.recorder import record_run
from sidecast.graphs.double_precision import ExampleInputs

MODEL_TYPE = "axis_graph"


def describe_axes(module: nn.Module, example_inputs: ExampleInputs) -> dict[str, Any]:
    """Runs a module once and describes which axes of its parameters carry the same neurons.

    Args:
        module: On any device, ``meta`` too.
        example_inputs: What it is called with: a tensor, a sequence of arguments, or a mapping of named ones.

    Returns:
        A configuration of model type ``axis_graph``, plain JSON. ``sets`` lists sets of neurons: the size, whether
        their order means something, and which sets they lie in (a set of dimensions lies in a set of heads if each
        head has its own). ``parameters`` lists shapes, in the order of their use, and parts that are products of sets.

    Raises:
        ConfigError: The module cannot be run with these inputs.
    """
    recording, axes_of = record_run(module, example_inputs)
    for name, axes in axes_of.items():
        _hold_unknown(axes, is_used=name in recording.uses)
    names = [*recording.uses, *(name for name in axes_of if name not in recording.uses)]
    _hold_twice_on_a_side(axes_of, recording.uses)
    parts = {name: _parts(axes_of[name], tuple(module.get_parameter(name).shape)) for name in names}
    sets = _Sets(parts, [*recording.seen.values(), *axes_of.values()])
    return {
        "model_type": MODEL_TYPE,
        "sets": sets.described(),
        "parameters": {
            name: {
                "shape": list(module.get_parameter(name).shape),
                "kind": (recording.uses.get(name) or Use(kind="shift")).kind,
                "parts": [sets.described_part(part, recording.uses.get(name)) for part in parts[name]],
            }
            for name in names
        },
        "held_at": list(recording.not_followed),
    }


class _Part:
    """Elements of a parameter that are a product of undivided dimensions, by axis."""

    def __init__(self, offset: int, factors: Iterable[tuple[int, Strided]]) -> None:
        self.offset = offset
        self.factors = [(axis, factor.dimension.found, factor.stride) for axis, factor in factors]


def _parts(axes: Axes, shape: Sequence[int]) -> list[_Part]:
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    parts = []
    for runs in product(*(runs_of(axis) for axis in axes)):
        offset = sum(run.offset * stride for run, stride in zip(runs, strides, strict=True))
        factors = [
            (axis, Strided(factor.dimension, factor.stride * strides[axis]))
            for axis, run in enumerate(runs)
            for factor in run.factors
        ]
        parts.append(_Part(offset, factors))
    return parts


def _hold_unknown(axes: Axes, *, is_used: bool) -> None:
    """Holds what the run did not show: a parameter without a use, and rows that it had no need of."""
    for axis in axes:
        for run in runs_of(axis):
            for factor in run.factors:
                if not is_used or not factor.dimension.found.is_joined:
                    hold(factor.dimension)


def _hold_twice_on_a_side(axes_of: Mapping[str, Axes], uses: Mapping[str, Use]) -> None:
    """Holds what lies twice on one side of a parameter, whose two places could be exchanged in a graph."""
    for name, use in uses.items():
        read = _undivided(use.reads)
        for side in (True, False):
            counts: Counter[int] = Counter()
            dimensions = {}
            for number, axis in enumerate(axes_of[name]):
                for dimension in _undivided([axis]).values():
                    if _is_read(axes_of[name], number, dimension, read) is side:
                        counts[id(dimension)] += 1
                        dimensions[id(dimension)] = dimension
            for key, count in counts.items():
                if count > 1:
                    hold(dimensions[key])


def _undivided(dimensions: Iterable[Dimension]) -> dict[int, Dimension]:
    return {
        id(factor.dimension.found): factor.dimension.found
        for dimension in dimensions
        for run in runs_of(dimension)
        for factor in run.factors
    }


def _is_read(axes: Axes, number: int, dimension: Dimension, read: Mapping[int, Dimension]) -> bool:
    """Whether an axis's dimension is on the side that is summed over; of two that could be, the last one is."""
    if id(dimension) not in read:
        return False
    carriers = [other for other, axis in enumerate(axes) if id(dimension) in _undivided([axis])]
    return number == carriers[-1]


class _Sets:
    """The undivided dimensions of all parameters, numbered in the order of their first use."""

    def __init__(self, parts: Mapping[str, list[_Part]], tensors: Iterable[Sequence[Dimension]]) -> None:
        self._dimensions: list[Dimension] = []
        self._numbers: dict[int, int] = {}
        for each in parts.values():
            for part in each:
                for _, dimension, _ in part.factors:
                    if id(dimension) not in self._numbers:
                        self._numbers[id(dimension)] = len(self._dimensions)
                        self._dimensions.append(dimension)
        self._within = self._find_within(tensors)

    def _find_within(self, tensors: Iterable[Sequence[Dimension]]) -> list[list[int]]:
        """The sets in whose members each set has members of its own: those that are there wherever it is."""
        always: dict[int, set[int]] = {}
        done: set[tuple[int, ...]] = set()
        for axes in tensors:
            key = tuple(id(axis.found) for axis in axes)
            if key in done:
                continue
            done.add(key)
            for runs in product(*(runs_of(axis) for axis in axes)):
                there = {
                    self._numbers[id(factor.dimension.found)]
                    for run in runs
                    for factor in run.factors
                    if id(factor.dimension.found) in self._numbers
                }
                for number in there:
                    always[number] = always[number] & there if number in always else set(there)
        return [
            sorted(
                other for other in always[number] if other != number and (number not in always[other] or other < number)
            )
            if not dimension.is_held
            else []
            for number, dimension in enumerate(self._dimensions)
        ]

    def described(self) -> list[dict[str, Any]]:
        return [
            {"size": dimension.size, "is_held": dimension.is_held, "within": within}
            for dimension, within in zip(self._dimensions, self._within, strict=True)
        ]

    def described_part(self, part: _Part, use: Use | None) -> dict[str, Any]:
        """A part's factors as pairs of set and stride, and which of them each side and the kernel has."""
        kind = "shift" if use is None else use.kind
        read = {} if use is None else _undivided(use.reads)
        last: dict[int, int] = {id(dimension): place for place, (_, dimension, _) in enumerate(part.factors)}
        kernel = [place for place, (axis, _, _) in enumerate(part.factors) if kind == "convolution" and axis > 1]
        reads = [
            place
            for place, (_, dimension, _) in enumerate(part.factors)
            if place not in kernel and id(dimension) in read and place == last[id(dimension)]
        ]
        writes = [place for place in range(len(part.factors)) if place not in (*kernel, *reads)]
        return {
            "offset": part.offset,
            "factors": [[self._numbers[id(dimension)], stride] for _, dimension, stride in part.factors],
            "source": self._completed(part, reads),
            "target": self._completed(part, writes),
            "kernel": kernel,
        }

    def _completed(self, part: _Part, places: list[int]) -> list[int]:
        """One side's factors, each after those that it lies within."""
        numbers = [self._numbers[id(dimension)] for _, dimension, _ in part.factors]
        completed: list[int] = []

        def add(place: int) -> None:
            for outer in self._within[numbers[place]]:
                own = [other for other in places if numbers[other] == outer]
                outer_place = own[0] if own else numbers.index(outer)
                if outer_place not in completed:
                    add(outer_place)
            if place not in completed:
                completed.append(place)

        for place in places:
            add(place)
        return completed
