"""WNN: a small network for one parameter's recent values and changes.

Shape suffixes: C context, N elements of one part, K horizons.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest, ParameterSpec
from sidecast.predictors.base import History
from sidecast.predictors.device import check_device, open_device
from sidecast.predictors.passes import BlockPass, PartContext, PassPlan, WritingPass, predict_in_passes
from sidecast.predictors.scaling_pass import ScalingPass, found_scale
from sidecast.predictors.shipped import shipped_weights
from sidecast.predictors.state_reader import StateReader
from sidecast.predictors.step_length import StepLength, check_step_length, step_length
from sidecast.predictors.tensor_parts import ElementRange, split_tensors
from sidecast.predictors.weights import load_tensors

OPERATIONS = ("conv", "linear", "bias")
PART_ELEMENTS = 1 << 16
"""Elements of one part: what the network makes of them takes some tens of megabytes."""


@dataclass(frozen=True, kw_only=True)
class WnnConfig:
    """Hyper-parameters of a WNN.

    Attributes:
        context_len: c, states that it reads.
        max_horizon: K, the largest horizon in snapshot intervals.
        hidden_dim: Width of each stream.
    """

    context_len: int = 5
    max_horizon: int = 40
    hidden_dim: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            least = 2 if name == "context_len" else 1
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; it must be an integer of at least {least}")


class TwoStreamNetwork(nn.Module):
    """Predicts changes of scalar parameters from their values and from the differences between these."""

    def __init__(self, config: WnnConfig) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.values = nn.Sequential(nn.Linear(config.context_len, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.differences = nn.Sequential(nn.Linear(config.context_len - 1, dim), nn.ReLU(), nn.Linear(dim, dim))
        self.joint = nn.Sequential(nn.ReLU(), nn.Linear(2 * dim, config.max_horizon))

    def forward(self, states_NC: Tensor) -> Tensor:
        streams = [self.values(states_NC), self.differences(states_NC.diff(dim=-1))]
        return self.joint(torch.cat(streams, dim=-1))


class WnnNetwork(nn.Module):
    """One two-stream network for each kind of operation: convolutions, matrices, and biases with other vectors.

    Source: Learning to Boost Training by Periodic Nowcasting Near Future Weights (ICML 2023), section 4.
    Deviations: outputs for all horizons 1..K instead of one, so that one network serves a horizon schedule; widths
    are free; inputs are scaled like NiNo's.
    """

    def __init__(self, config: WnnConfig) -> None:
        super().__init__()
        self.config = config
        self.operations = nn.ModuleDict({name: TwoStreamNetwork(config) for name in OPERATIONS})

    def forward(self, operation: str, states_NC: Tensor) -> Tensor:
        """Predicted scaled changes (N, K) of parameters of one kind of operation, from their scaled states."""
        return self.operations[operation](states_NC)


def operation_of(spec: ParameterSpec) -> str:
    """Which of the networks is responsible for a parameter."""
    if len(spec.shape) <= 1:
        return "bias"
    return "linear" if len(spec.shape) == 2 else "conv"


class WnnPredictor:
    """WNN, parameter by parameter.

    Args:
        network: A trained network.
        upd_scale: Share of the predicted scaled change that is used, for all parameters or by name pattern.
        device: Where to compute: ``cpu``, ``cuda`` or ``cuda:0`` and so on. The history may be elsewhere.
    """

    name = "wnn"

    def __init__(self, network: WnnNetwork, *, upd_scale: StepLength = 1.0, device: str = "cpu") -> None:
        check_step_length("upd_scale", upd_scale)
        check_device("device", device)
        self._device = device
        self.context_len: int | None = network.config.context_len
        self.max_horizon = network.config.max_horizon
        self._network = network.eval()
        self._upd_scale = upd_scale

    def plan(self, manifest: ModelManifest, horizon_intervals: int) -> PassPlan[ElementRange]:
        if not 1 <= horizon_intervals <= self.max_horizon:
            raise ConfigError(
                f"horizon is {horizon_intervals}; predictor {self.name!r} has outputs for 1 to {self.max_horizon} "
                "snapshot intervals"
            )
        reader = StateReader(open_device(self._device))
        network = copy.deepcopy(self._network).to(reader.device)
        changes = WnnChangePass(network, horizon_intervals, self._upd_scale, reader)
        passes: list[BlockPass[ElementRange]] = [ScalingPass(self.name, manifest, reader), changes]
        max_threads = None if reader.device.type == "cpu" else 1
        return PassPlan(split_tensors(manifest, PART_ELEMENTS), passes, max_threads)

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        predict_in_passes(self, history, horizon_intervals, out)


class WnnChangePass(WritingPass):
    """The last pass: writes the predicted change of every parameter.

    Args:
        network: The network.
        horizon_intervals: k.
        upd_scale: Share of the change that is used.
        reader: Brings states to the network.
    """

    def __init__(self, network: WnnNetwork, horizon_intervals: int, upd_scale: StepLength, reader: StateReader) -> None:
        self._reader = reader
        self._network = network
        self._horizon_intervals = horizon_intervals
        self._upd_scale = upd_scale

    def map(self, part: ElementRange, context: PartContext) -> None:
        scale = found_scale(part, context)
        start = context.manifest.offsets[part.fqn]
        states = self._reader.read(part, context)
        scaled_NC = torch.stack([scale.scaled(state) for state in states], dim=-1)
        operation = operation_of(context.manifest.spec(part.fqn))
        change_N = self._network(operation, scaled_NC)[:, self._horizon_intervals - 1]
        change_N *= step_length(self._upd_scale, part.fqn)
        part.write(scale.delta(change_N, states[-1]), context.out, start)


def network_from_tensors(source: str, tensors: Mapping[str, Tensor]) -> WnnNetwork:
    """A network whose hyper-parameters follow from the shapes of its tensors.

    Raises:
        ConfigError: These are not the tensors of a WNN.
    """
    try:
        hidden_dim, context_len = tensors["operations.bias.values.0.weight"].shape
        config = WnnConfig(
            context_len=context_len,
            hidden_dim=hidden_dim,
            max_horizon=tensors["operations.bias.joint.1.bias"].shape[0],
        )
        network = WnnNetwork(config)
        network.load_state_dict(dict(tensors))
    except (KeyError, ValueError, RuntimeError) as error:
        found = ", ".join(sorted(tensors)[:4])
        raise ConfigError(
            f"weights file {source} is no WNN: it has {found} ...; expected operations.{{conv,linear,bias}}."
            "{values,differences,joint}.* of matching shapes"
        ) from error
    return network


def create(*, weights: Path | None = None, upd_scale: StepLength = 1.0, device: str = "cpu") -> WnnPredictor:
    """WNN with the weights of a file, or with those that are shipped."""
    path = shipped_weights("wnn") if weights is None else weights
    tensors, _ = load_tensors(path)
    return WnnPredictor(network_from_tensors(str(path), tensors), upd_scale=upd_scale, device=device)
