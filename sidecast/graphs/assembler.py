"""Collects the nodes and blocks of one topology and accounts for every parameter of the manifest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from sidecast.errors import ConfigError
from sidecast.graphs.topology import Block, BlockKind, EdgeType, NodeLayer, NodeRange, ParameterView, Topology
from sidecast.manifest import ModelManifest

MAX_KERNEL_ELEMENTS = 9
_LARGEST_UNKNOWN_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class MatrixSlice:
    """A matrix of inputs x outputs inside a parameter, whichever way it is stored.

    Attributes:
        fqn: The parameter.
        shape: Shape of the entire parameter.
        offset: Element number of the matrix's first element.
        input_stride: Elements from one input to the next.
        output_stride: Elements from one output to the next.
    """

    fqn: str
    shape: tuple[int, ...]
    offset: int = 0
    input_stride: int
    output_stride: int

    @classmethod
    def linear(cls, fqn: str, num_inputs: int, num_outputs: int) -> MatrixSlice:
        """All of a weight of shape (outputs, inputs), as in ``torch.nn.Linear``."""
        return cls(fqn=fqn, shape=(num_outputs, num_inputs), input_stride=1, output_stride=num_inputs)

    @classmethod
    def transposed(cls, fqn: str, num_inputs: int, num_outputs: int) -> MatrixSlice:
        """All of a weight of shape (inputs, outputs)."""
        return cls(fqn=fqn, shape=(num_inputs, num_outputs), input_stride=num_outputs, output_stride=1)

    def block(
        self, name: str, inputs: NodeRange, outputs: NodeRange, edge_type: EdgeType, *, is_reversed: bool
    ) -> Block:
        """The matrix as a dense block: edges from its inputs to its outputs, or the other way round."""
        source, target = (outputs, inputs) if is_reversed else (inputs, outputs)
        strides = (self.input_stride, self.output_stride)
        source_stride, target_stride = strides[::-1] if is_reversed else strides
        view = ParameterView(fqn=self.fqn, offset=self.offset, source_stride=source_stride, target_stride=target_stride)
        return Block(
            name=name, edge_type=edge_type, source=source, target=target, view=view, source_major=not is_reversed
        )


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Between which nodes a matrix was drawn, or would have been if it were not frozen.

    Attributes:
        inputs: Nodes of its inputs, or of some of them.
        outputs: Nodes of its outputs, or of some of them.
        is_reversed: Whether its edges run from its outputs to its inputs.
        first_input: Which of all inputs of the parameter the first of these is.
        input_step: How many inputs further the next one is.
        first_output: Which of all outputs of the parameter the first of these is.
        output_step: How many outputs further the next one is.
    """

    inputs: NodeRange
    outputs: NodeRange
    is_reversed: bool
    first_input: int
    input_step: int
    first_output: int
    output_step: int


@dataclass(frozen=True, kw_only=True)
class VectorSlice:
    """A run of consecutive elements inside a parameter of any shape."""

    fqn: str
    shape: tuple[int, ...]
    offset: int = 0


class TopologyAssembler:
    """What a graph builder writes to: nodes in order, blocks in order, each parameter used once.

    A builder names every parameter that the architecture has. One that the manifest lacks is frozen: its nodes
    stay and its edges are left out. One that no builder named is refused, or set apart, by ``finish``.

    Attributes:
        manifest: The parameters and the configuration.
        placements: Where each matrix is, by parameter, frozen ones included.
    """

    def __init__(self, manifest: ModelManifest, adapted_modules: Iterable[str] = ()) -> None:
        self.manifest = manifest
        self.placements: dict[str, list[Placement]] = {}
        self._adapted_modules = tuple(adapted_modules)
        self._num_nodes = 0
        self._layers: list[NodeLayer] = []
        self._blocks: list[Block] = []
        self._known: dict[str, None] = {}
        self._absent: dict[str, None] = {}

    def nodes(self, count: int, name: str, *, is_boundary: bool = False) -> NodeRange:
        """Appends ``count`` nodes that play one role."""
        nodes = NodeRange(self._num_nodes, self._num_nodes + count)
        self._num_nodes = nodes.stop
        if count:
            self._layers.append(NodeLayer(name, nodes, is_boundary))
        return nodes

    def has(self, fqn: str) -> bool:
        """Whether the manifest lists this parameter."""
        return fqn in self.manifest.by_name

    def has_prefix(self, prefix: str) -> bool:
        """Whether any parameter, or any module that adapters adapt, has a name that begins so."""
        names = (*(spec.fqn for spec in self.manifest.parameters), *self._adapted_modules)
        return any(name.startswith(prefix) for name in names)

    def use(self, fqn: str, shape: tuple[int, ...]) -> bool:
        """Claims a parameter of the architecture; False if the manifest lacks it (it is frozen).

        Raises:
            ConfigError: The manifest gives it another shape than the configuration implies.
        """
        spec = self.manifest.by_name.get(fqn)
        if spec is None:
            self._absent[fqn] = None
            return False
        if spec.shape != shape:
            raise ConfigError(f"parameter {fqn!r} has shape {spec.shape}; the model's configuration implies {shape}")
        self._known[fqn] = None
        return True

    def structural(
        self,
        name: str,
        edge_type: EdgeType,
        source: NodeRange,
        target: NodeRange,
        kind: BlockKind = BlockKind.DENSE,
    ) -> None:
        """Appends edges that carry no parameter but the constant 1."""
        self._append(Block(name=name, edge_type=edge_type, source=source, target=target, kind=kind))

    def parametric(
        self,
        name: str,
        edge_type: EdgeType,
        source: NodeRange,
        target: NodeRange,
        view: ParameterView,
        kind: BlockKind = BlockKind.DENSE,
        source_major: bool = True,
    ) -> None:
        """Appends the edges of a parameter, or of a part of one, that was claimed by ``use``."""
        self._append(
            Block(
                name=name,
                edge_type=edge_type,
                source=source,
                target=target,
                kind=kind,
                view=view,
                source_major=source_major,
            )
        )

    def matrix(
        self,
        name: str,
        matrix: MatrixSlice,
        inputs: NodeRange,
        outputs: NodeRange,
        edge_type: EdgeType,
        *,
        is_reversed: bool = False,
    ) -> None:
        """Appends a matrix: edges from its inputs to its outputs, or the other way round."""
        self.place(matrix, inputs, outputs, is_reversed=is_reversed)
        if self.use(matrix.fqn, matrix.shape):
            self._append(matrix.block(name, inputs, outputs, edge_type, is_reversed=is_reversed))

    def place(self, matrix: MatrixSlice, inputs: NodeRange, outputs: NodeRange, *, is_reversed: bool = False) -> None:
        """Notes between which nodes a matrix is, whether or not it is drawn: its adapter goes there too."""
        is_one_of_many = not (matrix.input_stride or matrix.output_stride) and min(matrix.shape) > 1
        if len(matrix.shape) != 2 or is_one_of_many:
            # Which axis has the inputs, a single element does not tell.
            return
        row, column = divmod(matrix.offset, matrix.shape[1])
        inputs_are_rows = matrix.input_stride >= matrix.shape[1] > 1 or (
            matrix.input_stride == 0 < matrix.output_stride < matrix.shape[1]
        )
        row_stride, column_stride = (
            (matrix.input_stride, matrix.output_stride)
            if inputs_are_rows
            else (matrix.output_stride, matrix.input_stride)
        )
        along_rows, along_columns = (row, row_stride // matrix.shape[1]), (column, column_stride)
        (first_input, input_step), (first_output, output_step) = (
            (along_rows, along_columns) if inputs_are_rows else (along_columns, along_rows)
        )
        self.placements.setdefault(matrix.fqn, []).append(
            Placement(
                inputs=inputs,
                outputs=outputs,
                is_reversed=is_reversed,
                first_input=first_input,
                input_step=input_step,
                first_output=first_output,
                output_step=output_step,
            )
        )

    def kernel(
        self,
        matrix: MatrixSlice,
        num_elements: int,
        inputs: NodeRange,
        outputs: NodeRange,
        edge_type: EdgeType = EdgeType.CONV,
        kind: BlockKind = BlockKind.DENSE,
    ) -> None:
        """Appends a matrix of kernels, each of consecutive elements, on parallel edges of at most nine elements.

        The published weights have room for nine elements on an edge. A diagonal matrix has one kernel an output.
        """
        if not self.use(matrix.fqn, matrix.shape):
            return
        for first in range(0, num_elements, MAX_KERNEL_ELEMENTS):
            view = ParameterView(
                fqn=matrix.fqn,
                offset=matrix.offset + first,
                source_stride=matrix.input_stride,
                target_stride=0 if kind is BlockKind.DIAGONAL else matrix.output_stride,
                kernel_stride=1,
                num_kernel_elements=min(MAX_KERNEL_ELEMENTS, num_elements - first),
            )
            name = f"{matrix.fqn}.elements{first}" if num_elements > MAX_KERNEL_ELEMENTS else matrix.fqn
            self.parametric(name, edge_type, inputs, outputs, view, kind)

    def linear(
        self, fqn: str, inputs: NodeRange, outputs: NodeRange, edge_type: EdgeType = EdgeType.FULLY_CONNECTED
    ) -> None:
        """Appends a weight of shape (outputs, inputs), as in ``torch.nn.Linear``."""
        self.matrix(fqn, MatrixSlice.linear(fqn, len(inputs), len(outputs)), inputs, outputs, edge_type)

    def lookup(self, fqn: str, rows: NodeRange, columns: NodeRange, edge_type: EdgeType) -> None:
        """Appends a table or a weight of shape (inputs, outputs)."""
        self.matrix(fqn, MatrixSlice.transposed(fqn, len(rows), len(columns)), rows, columns, edge_type)

    def vector(self, fqn: str, source: NodeRange, target: NodeRange, edge_type: EdgeType) -> None:
        """Appends a vector on the edges from one node to as many target nodes."""
        self.vector_part(fqn, VectorSlice(fqn=fqn, shape=(len(target),)), source, target, edge_type)

    def vector_part(
        self, name: str, vector: VectorSlice, source: NodeRange, target: NodeRange, edge_type: EdgeType
    ) -> None:
        """Appends a run of a parameter's elements on the edges from one node to as many target nodes."""
        if self.use(vector.fqn, vector.shape):
            view = ParameterView(fqn=vector.fqn, offset=vector.offset, target_stride=1)
            self.parametric(name, edge_type, source, target, view)

    def _append(self, block: Block) -> None:
        if len(block.source) and len(block.target):
            self._blocks.append(block)

    def finish(self, family: str, layout: str, *, isolate_unknown: bool = False) -> Topology:
        """The topology of everything added.

        Args:
            family: Name of the builder.
            layout: Name of the layout.
            isolate_unknown: Give each parameter that the builder did not claim nodes of its own, apart from the
                rest of the graph, instead of refusing it.

        Raises:
            ConfigError: A parameter was not claimed, and ``isolate_unknown`` is not set, or most were not.
        """
        unknown = [spec.fqn for spec in self.manifest.parameters if spec.fqn not in self._known]
        if unknown and not isolate_unknown:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise ConfigError(
                f"the {family!r} graph builder does not know parameter {unknown[0]!r}{more}; "
                "predictors without a graph (linear, average, rank1, wnn) take any parameter"
            )
        if len(unknown) > _LARGEST_UNKNOWN_SHARE * len(self.manifest.parameters):
            raise ConfigError(
                f"the {family!r} graph builder knows only {len(self._known)} of {len(self.manifest.parameters)} "
                f"parameters, and not {unknown[0]!r}: names or configuration are another model's, so none is set apart"
            )
        for fqn in unknown:
            self._isolate(fqn)
        return Topology(
            family=family,
            layout=layout,
            num_nodes=self._num_nodes,
            blocks=tuple(self._blocks),
            parameters=self.manifest.parameters,
            layers=tuple(self._layers),
            absent=tuple(self._absent),
        )

    def _isolate(self, fqn: str) -> None:
        shape = self.manifest.spec(fqn).shape
        columns = prod(shape[1:]) if len(shape) > 1 else 1
        source = self.nodes(columns, f"{fqn}.inputs", is_boundary=True)
        target = self.nodes(shape[0] if shape else 1, f"{fqn}.outputs", is_boundary=True)
        edge_type = EdgeType.FULLY_CONNECTED if len(shape) > 1 else EdgeType.BIAS
        self.parametric(fqn, edge_type, source, target, ParameterView(fqn=fqn, source_stride=1, target_stride=columns))
