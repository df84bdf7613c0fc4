"""WNN: a small network for one parameter's recent values and changes.

Shape suffixes: C context, N elements of one piece, K horizons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.manifest import ParameterSpec
from sidecast.predictors.base import History, check_history, non_finite
from sidecast.predictors.step_length import StepLength, check_step_length, step_length
from sidecast.predictors.weights import load_tensors
from sidecast.scaling import Scale, tensor_scale

OPERATIONS = ("conv", "linear", "bias")
_PIECE_ELEMENTS = 1 << 16


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
    """

    name = "wnn"

    def __init__(self, network: WnnNetwork, *, upd_scale: StepLength = 1.0) -> None:
        check_step_length("upd_scale", upd_scale)
        self.context_len: int | None = network.config.context_len
        self.max_horizon = network.config.max_horizon
        self._network = network.eval()
        self._upd_scale = upd_scale

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        check_history(self, history, horizon_intervals)
        if horizon_intervals > self.max_horizon:
            raise ConfigError(
                f"horizon is {horizon_intervals}; predictor {self.name!r} has outputs for 1 to {self.max_horizon} "
                "snapshot intervals"
            )
        for spec in history.manifest.parameters:
            if spec.numel:
                self._predict_tensor(history, spec, horizon_intervals, out)

    @torch.inference_mode()
    def _predict_tensor(self, history: History, spec: ParameterSpec, horizon_intervals: int, out: Tensor) -> None:
        scale = _finite_scale(self.name, history, spec.fqn)
        factor = step_length(self._upd_scale, spec.fqn)
        first = history.manifest.offsets[spec.fqn]
        for start in range(first, first + spec.numel, _PIECE_ELEMENTS):
            piece = slice(start, min(start + _PIECE_ELEMENTS, first + spec.numel))
            scaled_NC = torch.stack([scale.scaled(state[piece]) for state in history.states], dim=-1)
            change_N = self._network(operation_of(spec), scaled_NC)[:, horizon_intervals - 1] * factor
            out[piece] = scale.delta(change_N, history.states[-1][piece])


def _finite_scale(predictor: str, history: History, fqn: str) -> Scale:
    scale = tensor_scale(history.tensor(fqn))
    if not torch.tensor([scale.mean, scale.std]).isfinite().all():
        raise non_finite(predictor, fqn)
    return scale


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


def create(*, weights: Path, upd_scale: StepLength = 1.0) -> WnnPredictor:
    """WNN with the weights of a file."""
    tensors, _ = load_tensors(weights)
    return WnnPredictor(network_from_tensors(str(weights), tensors), upd_scale=upd_scale)
