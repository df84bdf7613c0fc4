"""The fused predictor equals the plain one on graphs with everything that a graph can have, however it is cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.graphs.topology import Block, BlockKind, EdgeType, NodeRange, ParameterView, Topology
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History, Predictor
from sidecast.predictors.file_workspace import FileWorkspace
from sidecast.predictors.nino import block_parts
from sidecast.predictors.nino.backend import cpu_backend
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.graph_cache import GraphCache, NeuralGraph
from sidecast.predictors.nino.kernels import CpuKernels
from sidecast.predictors.nino.plain import PlainNinoPredictor
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import NinoWeights
from sidecast.predictors.passes import predict_in_passes

SHAPES = [
    ("dense", [7, 5]),
    ("key", [4, 5]),
    ("conv1d", [5, 6]),
    ("scrambled", [9, 5]),
    ("norm", [5]),
    ("kernel", [3, 2, 2, 2]),
    ("empty", [0, 5]),
    ("single", [1]),
]
MANIFEST = ModelManifest.from_shapes(SHAPES, {"model_type": "made up"})


def block(
    name: str, edge_type: EdgeType, source: int, num_sources: int, target: int, num_targets: int, **more: object
) -> Block:
    ends = NodeRange(source, source + num_sources), NodeRange(target, target + num_targets)
    return Block(name=name, edge_type=edge_type, source=ends[0], target=ends[1], **more)  # type: ignore[arg-type]


TOPOLOGY = Topology(
    "made up",
    "official",
    24,
    (
        block(
            "dense",
            EdgeType.FULLY_CONNECTED,
            0,
            5,
            5,
            7,
            view=ParameterView(fqn="dense", source_stride=1, target_stride=5),
        ),
        block(
            "key",
            EdgeType.KEY,
            5,
            4,
            0,
            5,
            view=ParameterView(fqn="key", source_stride=5, target_stride=1),
            source_major=False,
        ),
        block("conv1d", EdgeType.VALUE, 0, 5, 6, 6, view=ParameterView(fqn="conv1d", source_stride=6, target_stride=1)),
        block(
            "scrambled",
            EdgeType.TOKEN_EMBEDDING,
            12,
            9,
            0,
            5,
            view=ParameterView(fqn="scrambled", source_stride=5, target_stride=1, transposed_shape=(9, 5)),
        ),
        block(
            "norm",
            EdgeType.NORM,
            0,
            5,
            6,
            5,
            kind=BlockKind.DIAGONAL,
            view=ParameterView(fqn="norm", source_stride=1),
        ),
        block(
            "kernel",
            EdgeType.CONV,
            0,
            2,
            20,
            3,
            view=ParameterView(fqn="kernel", source_stride=4, target_stride=8, kernel_stride=1, num_kernel_elements=4),
        ),
        block("empty", EdgeType.FULLY_CONNECTED, 3, 0, 5, 5, view=ParameterView(fqn="empty", source_stride=5)),
        block("single", EdgeType.BIAS, 23, 1, 2, 1, view=ParameterView(fqn="single")),
        block("heads", EdgeType.HEAD, 21, 2, 5, 4),
        block("residual", EdgeType.RESIDUAL, 0, 5, 7, 5, kind=BlockKind.DIAGONAL),
    ),
    MANIFEST.parameters,
)


def network_weights(**hyper_parameters: object) -> NinoWeights:
    settings = {"hidden_dim": 8, "max_horizon": 3, "lpe_dim": 3, "max_kernel_elements": 4} | hyper_parameters
    config = NinoConfig(**settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(shape, generator=generator) / 3 for name, shape in config.shapes().items()}
    return NinoWeights(config, tensors, "memory")


def graphs(topology: Topology = TOPOLOGY) -> GraphCache:
    lpe = torch.randn(topology.num_nodes, 3, generator=torch.Generator().manual_seed(2))
    return GraphCache(lambda manifest, layout, lpe_dim: NeuralGraph(topology, lpe))


def history(dtype: torch.dtype = torch.float32, context_len: int = 5) -> History:
    generator = torch.Generator().manual_seed(3)
    states = [torch.randn(MANIFEST.num_elements, generator=generator).to(dtype) for _ in range(context_len)]
    return History(MANIFEST, states)


def delta(predictor: Predictor, states: History, horizon: int = 2) -> Tensor:
    out = torch.full((states.manifest.num_elements,), torch.nan)
    predictor.predict(states, horizon, out)
    return out


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
def test_any_number_of_layers(num_layers: int) -> None:
    weights = network_weights(num_layers=num_layers)
    expected = delta(PlainNinoPredictor(weights, graphs=graphs()), history())
    torch.testing.assert_close(
        delta(NinoPredictor(weights, graphs=graphs()), history()), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("context_len", [2, 7])
def test_any_context(context_len: int) -> None:
    weights = network_weights(context_len=context_len)
    states = history(context_len=context_len)
    expected = delta(PlainNinoPredictor(weights, graphs=graphs()), states)
    torch.testing.assert_close(delta(NinoPredictor(weights, graphs=graphs()), states), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("max_scalars", "max_sources", "max_nodes"), [(1, 1, 1), (6, 2, 3), (16, 4, 2)])
@pytest.mark.parametrize("gnn", [True, False])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_cut_into_parts(
    max_scalars: int, max_sources: int, max_nodes: int, gnn: bool, num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = network_weights(gnn=gnn)
    expected = delta(PlainNinoPredictor(weights, graphs=graphs()), history())
    monkeypatch.setattr(block_parts, "MAX_SCALARS", max_scalars)
    monkeypatch.setattr(block_parts, "MAX_SOURCES", max_sources)
    monkeypatch.setattr(block_parts, "MAX_NODES", max_nodes)
    found = delta(NinoPredictor(weights, graphs=graphs(), num_threads=num_threads), history())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tile_edges", [1, 3, 8])
def test_any_tile(tile_edges: int) -> None:
    weights = network_weights()
    expected = delta(PlainNinoPredictor(weights, graphs=graphs()), history())
    predictor = NinoPredictor(weights, graphs=graphs(), backend=cpu_backend(CpuKernels(tile_edges=tile_edges), 5))
    torch.testing.assert_close(delta(predictor, history()), expected, rtol=1e-4, atol=1e-5)


def test_threads_leave_torch_as_it_was_and_the_result_bit_for_bit() -> None:
    weights, before = network_weights(), torch.get_num_threads()
    alone = delta(NinoPredictor(weights, graphs=graphs(), num_threads=1), history())
    assert torch.equal(delta(NinoPredictor(weights, graphs=graphs(), num_threads=4), history()), alone)
    assert torch.get_num_threads() == before


def test_node_sums_may_lie_in_files_that_are_let_go_of_all_the_time(tmp_path: Path) -> None:
    weights, states, out = network_weights(), history(), torch.empty(MANIFEST.num_elements)
    workspace = FileWorkspace(tmp_path, min_file_bytes=0)
    predictor = NinoPredictor(weights, graphs=graphs())
    predict_in_passes(predictor, states, 2, out, num_threads=3, workspace=workspace)
    assert torch.equal(out, delta(predictor, states))


def test_parts_are_a_sequence() -> None:
    limits = block_parts.PartLimits(max_scalars=6, max_sources=2, max_nodes=3)
    parts = block_parts.split_topology(TOPOLOGY, limits)
    assert len(parts) == len(list(parts))
    assert repr(parts[-1]) == repr(list(parts)[len(parts) - 1])
    assert repr(parts[3:-2:4]) == repr(list(parts)[3:-2:4])
    with pytest.raises(IndexError, match=f"part {len(parts)} of {len(parts)}"):
        parts[len(parts)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_fp32(dtype: torch.dtype) -> None:
    predictor = NinoPredictor(network_weights(), graphs=graphs())
    states = history(dtype)
    widened = History(MANIFEST, [state.float() for state in states.states])
    torch.testing.assert_close(delta(predictor, states), delta(predictor, widened), rtol=1e-5, atol=1e-6)


def test_states_may_be_strided() -> None:
    predictor = NinoPredictor(network_weights(), graphs=graphs())
    columns = torch.stack(list(history().states), dim=1)
    strided = History(MANIFEST, list(columns.T))
    torch.testing.assert_close(delta(predictor, strided), delta(predictor, history()))


def test_bf16_products_are_close() -> None:
    weights = network_weights()
    exact = delta(NinoPredictor(weights, graphs=graphs()), history())
    rough = delta(NinoPredictor(weights, graphs=graphs(), precision="bf16"), history())
    assert 0 < (rough - exact).abs().mean() < 0.03 * exact.abs().mean()


def test_constant_tensors_do_not_move() -> None:
    states = history()
    for fqn in ("key", "single"):
        for part in states.tensor(fqn):
            part.fill_(1234.567)
    found = delta(NinoPredictor(network_weights(), graphs=graphs()), states)
    moved = {
        spec.fqn: found[start : start + spec.numel]
        for spec, start in zip(MANIFEST.parameters, MANIFEST.offsets.values(), strict=True)
    }
    assert not moved["key"].any()
    assert not moved["single"].any()
    assert moved["dense"].abs().min() > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("plain", [True, False])
def test_non_finite_histories_are_refused(bad: float, plain: bool) -> None:
    states = history()
    states.tensor("norm")[1][2] = bad
    family = PlainNinoPredictor if plain else NinoPredictor
    with pytest.raises(ConfigError, match="'norm' has NaN or infinite values"):
        delta(family(network_weights(), graphs=graphs()), states)


def test_step_length_by_name() -> None:
    whole = delta(NinoPredictor(network_weights(), graphs=graphs()), history())
    for family in (NinoPredictor, PlainNinoPredictor):
        found = delta(family(network_weights(), graphs=graphs(), upd_scale={"dense": 0.25}), history())
        torch.testing.assert_close(found[:35], whole[:35] / 4, rtol=1e-3, atol=5e-6)
        torch.testing.assert_close(found[35:], whole[35:], rtol=1e-4, atol=1e-5)


def test_large_kernels_are_refused() -> None:
    weights = network_weights()
    config = NinoConfig(hidden_dim=8, max_horizon=3, lpe_dim=3, max_kernel_elements=3)
    tensors = {
        name: weights.tensors[name][tuple(slice(size) for size in shape)] for name, shape in config.shapes().items()
    }
    with pytest.raises(ConfigError, match=r"'kernel' has kernels of 4 elements.*at most 3"):
        delta(NinoPredictor(NinoWeights(config, tensors, "memory"), graphs=graphs()), history())


def test_parameters_off_the_graph_are_refused() -> None:
    partial = Topology("made up", "official", 24, TOPOLOGY.blocks[1:], MANIFEST.parameters)
    with pytest.raises(ConfigError, match="carries 125 scalar parameters; the model has 160"):
        delta(NinoPredictor(network_weights(), graphs=graphs(partial)), history())


@pytest.mark.parametrize(("option", "value"), [("precision", "fp8"), ("num_threads", 0)])
def test_bad_options(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=option):
        NinoPredictor(network_weights(), graphs=graphs(), **{option: value})  # type: ignore[arg-type]


def test_horizon_beyond_the_network() -> None:
    with pytest.raises(ConfigError, match=r"horizon is 4; predictor 'nino' has outputs for 1 to 3"):
        delta(NinoPredictor(network_weights(), graphs=graphs()), history(), horizon=4)
