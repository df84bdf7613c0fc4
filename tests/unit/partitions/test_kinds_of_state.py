"""What optimizers keep besides a tensor for each parameter: put back bit for bit, or refused."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.trainer.partitions.optimizer_state import Master, OptimizerState, whole_masters
from sidecast.trainer.partitions.rollback import RollbackCopy, RollbackError


class Codes(Tensor):
    """As torchao's optimizers keep their moments: codes and scales, and few of torch's functions."""

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], _: None, size: Any, stride: Any) -> Any:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        raise NotImplementedError(f"{func}")


@pytest.fixture
def parameter() -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, 512))


@pytest.fixture
def optimizer(parameter: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter], lr=0.1)


@pytest.fixture
def masters(parameter: nn.Parameter) -> list[Master]:
    return whole_masters([parameter])


def codes() -> Codes:
    return Codes(torch.arange(512).to(torch.uint8), torch.tensor([0.5, 0.25]))


def captured(state: OptimizerState, masters: list[Master]) -> RollbackCopy:
    copy = RollbackCopy.allocate(state.num_bytes(masters))
    with torch.no_grad():
        state.capture(masters, copy)
    return copy


def test_quantized_moments_come_back_bit_for_bit(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, masters: list[Master]
) -> None:
    """Those of torchao (ao issue 1044) are tensors that have no memory of their own."""
    moment = codes()
    optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": moment}
    state = OptimizerState([optimizer], None)
    # Weights, codes, scales and the counter, each of which fills its cache lines.
    assert state.num_bytes(masters) == 2048 + 512 + 64 + 64
    copy = captured(state, masters)
    with torch.no_grad():
        moment.codes.zero_()
        moment.scale.fill_(7.0)
        parameter.zero_()
        state.require_restorable(masters, copy)
        state.restore(masters, copy)
    assert optimizer.state[parameter]["exp_avg"] is moment
    assert moment.codes.equal(codes().codes)
    assert moment.scale.equal(codes().scale)
    assert parameter.equal(torch.linspace(-1, 1, 512))


def test_quantized_moments_that_are_gone_are_no_surprise_in_the_middle_of_a_rollback(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, masters: list[Master]
) -> None:
    optimizer.state[parameter] = {"exp_avg": codes()}
    state = OptimizerState([optimizer], None)
    copy = captured(state, masters)
    optimizer.state[parameter]["exp_avg"] = torch.zeros(512)
    with pytest.raises(RollbackError, match="'exp_avg' of the optimizer's state is not what was captured"):
        state.require_restorable(masters, copy)


def test_quantized_moments_are_neither_scaled_nor_reset(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, masters: list[Master]
) -> None:
    state = OptimizerState([optimizer], None)
    optimizer.state[parameter] = {"exp_avg": torch.zeros(512)}
    state.require_scalable(masters)
    state.require_resettable(masters)
    optimizer.state[parameter] = {"exp_avg": codes()}
    with pytest.raises(RollbackError, match="moments: scale cannot scale 'exp_avg', which is a Codes"):
        state.require_scalable(masters)
    with pytest.raises(RollbackError, match="moments: reset does not know what 'exp_avg'"):
        state.require_resettable(masters)


def test_what_is_kept_for_all_parameters_together_comes_back(
    optimizer: torch.optim.Optimizer, masters: list[Master]
) -> None:
    """As MADGRAD, SPAM and others count their steps; torch's ``state_dict`` has it, too."""
    optimizer.state["k"], optimizer.state["ema"] = torch.tensor([4]), 0.5  # type: ignore[index]
    state = OptimizerState([optimizer], None)
    copy = captured(state, masters)
    optimizer.state["k"].add_(6)  # type: ignore[index]
    optimizer.state["ema"] = 0.75  # type: ignore[index]
    with torch.no_grad():
        state.restore(masters, copy)
    assert optimizer.state["k"].equal(torch.tensor([4]))  # type: ignore[index]
    assert optimizer.state["ema"] == 0.5  # type: ignore[index]
    with pytest.raises(RollbackError, match="moments: reset cannot reset 'k', which the optimizer keeps for all"):
        state.require_resettable(masters)


@pytest.mark.parametrize("kept", [{"s": torch.zeros(3)}, [torch.zeros(3)]])
def test_what_is_kept_for_all_parameters_in_a_container_is_no_way_back(
    kept: Any, optimizer: torch.optim.Optimizer, masters: list[Master]
) -> None:
    state = OptimizerState([optimizer], None)
    optimizer.state["buckets"] = kept  # type: ignore[index]
    with pytest.raises(
        RollbackError, match=f"'buckets', which the optimizer keeps for all parameters, is a {type(kept).__name__}"
    ):
        captured(state, masters)


@pytest.mark.parametrize("name", ["MADGRAD", "FTRL", "DAdaptAdaGrad", "Ranger21", "ScheduleFreeWrapper", "TRAC"])
def test_optimizers_whose_steps_take_a_jump_back_are_refused(name: str, parameter: nn.Parameter) -> None:
    optimizer = type(name, (torch.optim.SGD,), {})([parameter], lr=0.1)
    with pytest.raises(ConfigError, match=rf"the optimizer is a {name}, which keeps a second copy of the weights, or"):
        OptimizerState([optimizer], None)


class Around(torch.optim.Optimizer):
    """Leaves its steps to another one, as sharpness-aware optimizers and torchtitan's containers do."""

    def __init__(self, parameters: Any, *, has_its_state: bool, held: str = "bare") -> None:
        super().__init__(parameters, {"lr": 0.1})
        inner = torch.optim.AdamW(self.param_groups)
        self.inner = {"bare": inner, "list": [inner], "dict": {"only": inner}}[held]
        if has_its_state:
            self.state = inner.state


@pytest.mark.parametrize("held", ["bare", "list", "dict"])
def test_an_optimizer_whose_inner_one_has_a_state_of_its_own_is_refused(held: str, parameter: nn.Parameter) -> None:
    """SAM's own state knows nothing of Adam's moments (davda54/sam issue 73)."""
    with pytest.raises(ConfigError, match=r"a Around, which leaves its steps to a AdamW .*; give that one to sidecast"):
        OptimizerState([Around([parameter], has_its_state=False, held=held)], None)
    OptimizerState([Around([parameter], has_its_state=True, held=held)], None)
