"""NiNo and WNN+ exactly, at the speed of the hardware: fused, tile by tile, in memory that does not grow with edges."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.graphs.topology import Topology
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History
from sidecast.predictors.nino.backend import NinoBackend, check_precision, open_backend
from sidecast.predictors.nino.block_parts import BlockPart, in_degrees, split_topology
from sidecast.predictors.nino.fusion import fuse, fuse_mlp
from sidecast.predictors.nino.graph_cache import GraphCache
from sidecast.predictors.nino.passes import ChangePass, ConvolutionPass, FirstConvolutionPass
from sidecast.predictors.nino.weights import NinoWeights, load_weights
from sidecast.predictors.passes import BlockPass, PassPlan, predict_in_passes
from sidecast.predictors.scaling_pass import ScalingPass
from sidecast.predictors.shipped import shipped_weights
from sidecast.predictors.step_length import StepLength, check_step_length


class NinoPredictor:
    """NiNo (or WNN+, if the weights are such), evaluated in passes over the blocks of the neural graph.

    The same function as the published module, to round-off. The history is read part by part, once for the scales
    and once for each convolution and for the output; beyond it, memory is some hidden vectors for each *node*.

    Args:
        weights: The network.
        graphs: Where graphs are kept between calls.
        layout: ``official`` or ``symmetric``; None for the one that the weights state, else ``official`` where the
            family has it, else ``symmetric``.
        upd_scale: Share of the predicted scaled change that is used, for all parameters or by name pattern.
        device: Where to compute: ``cpu``, ``cuda`` or ``cuda:0`` and so on. The history may be elsewhere.
        precision: How hidden vectors are multiplied: in ``fp32``, or in ``bf16`` on processors that have it; on CUDA
            also in ``tf32``. On a CPU ``auto`` is bf16 where the processor multiplies it, else fp32. Sums are always
            fp32.
        loops: Compiled loops to take on a CPU, instead of the fastest that its processor can run.
        num_threads: Threads to work on with a CPU; torch's number of intra-op threads if None. Engines of the service
            use no more than they were given.
        backend: What to compute with, instead of what suits the device and precision.

    Source: NiNo (arXiv 2409.04434), section 4.
    """

    def __init__(
        self,
        weights: NinoWeights,
        *,
        graphs: GraphCache,
        layout: str | None = None,
        upd_scale: StepLength = 1.0,
        device: str = "cpu",
        precision: str = "fp32",
        loops: str = "auto",
        num_threads: int | None = None,
        backend: NinoBackend | None = None,
    ) -> None:
        check_step_length("upd_scale", upd_scale)
        check_precision(device, precision, loops)
        if num_threads is not None and num_threads < 1:
            raise ConfigError(f"num_threads is {num_threads}; it must be at least 1")
        self.name = "nino" if weights.config.gnn else "wnn_plus"
        self.context_len: int | None = weights.config.context_len
        self.max_horizon = weights.config.max_horizon
        self._config = weights.config
        self._network = fuse(weights) if weights.config.gnn else fuse_mlp(weights)
        self._graphs = graphs
        self._layout = weights.layout if layout is None else layout
        self._upd_scale = upd_scale
        self._device = device
        self._precision = precision
        self._loops = loops
        self._num_threads = num_threads
        self._backend = backend

    def prepare(self, manifest: ModelManifest) -> None:
        self.plan(manifest, 1)

    def plan(self, manifest: ModelManifest, horizon_intervals: int) -> PassPlan[BlockPart]:
        """The passes of a prediction, for running them in this process or on several workers."""
        # Opened anew: streams and pinned memory cannot travel to other processes, as predictors do.
        backend = self._backend or open_backend(self._device, self._precision, self._loops, self._config)
        self._config.check_horizon(self.name, horizon_intervals)
        graph = self._graphs.graph(manifest, self._layout, self._config.lpe_dim if self._config.gnn else 0)
        self._check_kernels(graph.topology)
        device = backend.reader.device
        network = self._network.to(device)
        passes: list[BlockPass[BlockPart]] = [ScalingPass(self.name, manifest, backend.reader)]
        if network.convolutions:
            degree_V = in_degrees(graph.topology).to(device)
            passes.append(FirstConvolutionPass(network, backend.features, graph.lpe_VL.to(device), degree_V))
            passes += [
                ConvolutionPass(network, layer, backend.features, degree_V, backend.kernels)
                for layer in range(1, len(network.convolutions))
            ]
        passes.append(
            ChangePass(
                network,
                horizon_intervals,
                backend.features,
                self._upd_scale,
                backend.kernels,
                by_element=not self._config.gnn,
            )
        )
        parts = split_topology(graph.topology, backend.limits, device)
        return PassPlan(parts, passes, self._num_threads if backend.max_threads is None else backend.max_threads)

    def _check_kernels(self, topology: Topology) -> None:
        limit = self._config.max_kernel_elements
        for block in topology.blocks:
            if self._config.gnn and block.view is not None and block.view.num_kernel_elements > limit:
                raise ConfigError(
                    f"parameter {block.view.fqn!r} has kernels of {block.view.num_kernel_elements} elements; "
                    f"these weights of predictor {self.name!r} take at most {limit}"
                )

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        num_threads = torch.get_num_threads() if self._num_threads is None else self._num_threads
        predict_in_passes(self, history, horizon_intervals, out, num_threads=num_threads)


def create(
    *,
    weights: Path | None = None,
    layout: str | None = None,
    upd_scale: StepLength = 1.0,
    device: str = "cpu",
    precision: str = "fp32",
    loops: str = "auto",
    num_threads: int | None = None,
) -> NinoPredictor:
    """NiNo with the weights of a file, or with those that are shipped."""
    return _create("nino", True, weights, layout, upd_scale, device, precision, loops, num_threads)


def create_wnn_plus(
    *,
    weights: Path | None = None,
    layout: str | None = None,
    upd_scale: StepLength = 1.0,
    device: str = "cpu",
    precision: str = "fp32",
    loops: str = "auto",
    num_threads: int | None = None,
) -> NinoPredictor:
    """WNN+ with the weights of a file, or with those that are shipped."""
    return _create("wnn_plus", False, weights, layout, upd_scale, device, precision, loops, num_threads)


def _create(
    name: str,
    gnn: bool,
    weights: Path | None,
    layout: str | None,
    upd_scale: StepLength,
    device: str,
    precision: str,
    loops: str,
    num_threads: int | None,
) -> NinoPredictor:
    loaded = load_weights(shipped_weights(name) if weights is None else weights)
    if loaded.config.gnn is not gnn:
        other = "wnn_plus" if gnn else "nino"
        raise ConfigError(f"weights file {weights} is for predictor {other!r}, not for {name!r}")
    return NinoPredictor(
        loaded,
        graphs=GraphCache(),
        layout=layout,
        upd_scale=upd_scale,
        device=device,
        precision=precision,
        loops=loops,
        num_threads=num_threads,
    )
