"""Any network, from which axes of its parameters carry the same neurons.

There is no published graph of such networks, so there is no official layout.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

from sidecast.errors import ConfigError
from sidecast.graphs.assembler import MAX_KERNEL_ELEMENTS, MatrixSlice, TopologyAssembler
from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.builders.neuron_sets import NeuronSet, NeuronSets, row_major
from sidecast.graphs.model_config import ModelConfig
from sidecast.graphs.topology import BlockKind, EdgeType, NodeRange, ParameterView

_EDGE_TYPES = {
    "matrix": EdgeType.FULLY_CONNECTED,
    "table": EdgeType.TOKEN_EMBEDDING,
    "convolution": EdgeType.CONV,
    "scale": EdgeType.NORM,
    "shift": EdgeType.BIAS,
}
_OPENS_RANGES = {"matrix", "table", "convolution"}


def draw_axis_graph(assembler: TopologyAssembler, config: ModelConfig) -> None:
    """Draws the axes that ``describe_axes`` has found.

    Raises:
        ConfigError: The configuration is not what it gives, is of parameters of other shapes, or does not cover every
            element of a parameter once.
    """
    try:
        sets = [
            NeuronSet(size=int(each["size"]), is_held=bool(each["is_held"]), within=tuple(each["within"]))
            for each in config.values["sets"]
        ]
        parameters = dict(config.values["parameters"])
        drawing = _AxisGraph(assembler, NeuronSets(assembler, sets))
        for name, described in parameters.items():
            drawing.draw(name, described)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ConfigError(
            f"the model's configuration does not describe the axes of a model ({type(error).__name__}: {error}); make "
            "the manifest with manifest_of_module"
        ) from error


class _AxisGraph:
    """Draws parameters one after another."""

    def __init__(self, assembler: TopologyAssembler, sets: NeuronSets) -> None:
        self._assembler = assembler
        self._sets = sets

    def draw(self, name: str, described: dict[str, Any]) -> None:
        kind, parts = described["kind"], described["parts"]
        shape = tuple(int(size) for size in described["shape"])
        self._assembler.use(name, shape)
        self._check_covered(name, parts, prod(shape))
        for number, part in enumerate(parts):
            self._draw_part(name if len(parts) == 1 else f"{name}.part{number}", name, kind, part, shape)

    def _check_covered(self, name: str, parts: list[dict[str, Any]], num_elements: int) -> None:
        num_covered = 0
        for part in parts if num_elements else ():
            offset = int(part["offset"])
            factors = [(int(stride), self._sets.size(number)) for number, stride in part["factors"]]
            num_covered += prod(size for _, size in factors)
            # How far the faster factors reach.
            reach = 0
            for stride, size in sorted(factors):
                if stride <= reach:
                    raise ConfigError(
                        f"the description of parameter {name!r} has a stride of {stride}, where faster ones reach "
                        f"{reach} elements far; strides must nest"
                    )
                reach += (size - 1) * stride
            if not 0 <= offset <= offset + reach < num_elements:
                raise ConfigError(
                    f"the description of parameter {name!r} reaches from element {offset} to {offset + reach}; it has "
                    f"{num_elements}"
                )
        if num_covered != num_elements:
            raise ConfigError(f"the description of parameter {name!r} covers {num_covered} of {num_elements} elements")

    def _draw_part(self, name: str, fqn: str, kind: str, part: dict[str, Any], shape: tuple[int, ...]) -> None:
        factors = [(int(number), int(stride)) for number, stride in part["factors"]]
        sizes = [self._sets.size(number) for number, _ in factors]
        sides = {}
        for side in ("source", "target"):
            places = [int(place) for place in part[side]]
            opens = side == "target" and kind in _OPENS_RANGES
            key = tuple(factors[place][0] for place in places)
            sides[side] = (places, self._sets.nodes(key, f"{name}.{side}", opens=opens))
        (source_places, source), (target_places, target) = sides["source"], sides["target"]
        shared = set(source_places) & set(target_places)
        inner_source = _evenly_spaced(source_places, factors, sizes, shared)
        inner_target = _evenly_spaced(target_places, factors, sizes, shared)
        outer = [
            place
            for place in dict.fromkeys((*source_places, *target_places))
            if place not in inner_source and place not in inner_target
        ]
        kernel = list(part["kernel"])
        for indices in product(*(range(sizes[place]) for place in outer)):
            fixed = dict(zip(outer, indices, strict=True))
            offset = int(part["offset"]) + sum(index * factors[place][1] for place, index in fixed.items())
            self._draw_block(
                name + "".join(f".{index}" for index in indices),
                ParameterView(
                    fqn=fqn,
                    offset=offset,
                    source_stride=factors[inner_source[-1]][1] if inner_source else 0,
                    target_stride=factors[inner_target[-1]][1] if inner_target else 0,
                ),
                _part_of(source, source_places, inner_source, sizes, fixed),
                _part_of(target, target_places, inner_target, sizes, fixed),
                _EDGE_TYPES[kind],
                prod(sizes[place] for place in kernel),
                shape,
            )

    def _draw_block(
        self,
        name: str,
        view: ParameterView,
        source: NodeRange,
        target: NodeRange,
        edge_type: EdgeType,
        num_elements: int,
        shape: tuple[int, ...],
    ) -> None:
        """One dense block, or as many parallel ones as a kernel's elements need; none where it is frozen."""
        if edge_type is EdgeType.FULLY_CONNECTED:
            matrix = MatrixSlice(
                fqn=view.fqn,
                shape=shape,
                offset=view.offset,
                input_stride=view.source_stride,
                output_stride=view.target_stride,
            )
            self._assembler.place(matrix, source, target)
        if not self._assembler.has(view.fqn):
            return
        for first in range(0, num_elements, MAX_KERNEL_ELEMENTS):
            count = min(MAX_KERNEL_ELEMENTS, num_elements - first)
            part = ParameterView(
                fqn=view.fqn,
                offset=view.offset + first,
                source_stride=view.source_stride,
                target_stride=view.target_stride,
                kernel_stride=1 if num_elements > 1 else 0,
                num_kernel_elements=count,
            )
            part_name = name if num_elements <= MAX_KERNEL_ELEMENTS else f"{name}.elements{first}"
            self._assembler.parametric(part_name, edge_type, source, target, part, BlockKind.DENSE)


def _evenly_spaced(places: list[int], factors: list[tuple[int, int]], sizes: list[int], shared: set[int]) -> list[int]:
    """The last factors of a side whose members lie at one distance from each other in the parameter."""
    inner: list[int] = []
    for place in reversed(places):
        if place in shared:
            break
        if inner and factors[place][1] != sizes[inner[0]] * factors[inner[0]][1]:
            break
        inner.insert(0, place)
    return inner


def _part_of(
    nodes: NodeRange, places: list[int], inner: list[int], sizes: list[int], fixed: dict[int, int]
) -> NodeRange:
    """The nodes of one side whose outer factors are at fixed members."""
    width = prod(sizes[place] for place in inner)
    outer = places[: len(places) - len(inner)]
    start = nodes.start + width * row_major([fixed[place] for place in outer], [sizes[place] for place in outer])
    return NodeRange(start, start + width)


BUILDER = GraphBuilder(family="axis_graph", model_types=("axis_graph",), layouts={"symmetric": draw_axis_graph})
