"""The copy that a rollback comes from."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch

from sidecast.trainer.partitions.optimizer_state import OptimizerState, whole_masters
from sidecast.trainer.partitions.rollback import RollbackCopy, RollbackError, packed_bytes


def stepped_adam() -> tuple[torch.optim.Optimizer, torch.nn.Parameter]:
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 33))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    step(optimizer, parameter)
    return optimizer, parameter


def step(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> None:
    parameter.grad = parameter.detach() ** 2 + 1
    optimizer.step()


def test_tensors_of_every_dtype_come_back_bit_for_bit() -> None:
    tensors = {
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "half": torch.arange(5, dtype=torch.bfloat16).view(5, 1),
        "scalar": torch.tensor(3.0),
        "count": torch.tensor([7, 8], dtype=torch.int64),
        "none": torch.empty(0),
    }
    copy = RollbackCopy.allocate(packed_bytes(tensor.nbytes for tensor in tensors.values()))
    copy.save(tensors, {"step": 4})
    for name, tensor in copy.tensors().items():
        assert tensor.dtype == tensors[name].dtype
        assert tensor.shape == tensors[name].shape
        assert tensor.reshape(-1).view(torch.uint8).equal(tensors[name].reshape(-1).view(torch.uint8))
    assert copy.values() == {"step": 4}


def test_capturing_again_reuses_the_memory() -> None:
    copy = RollbackCopy.allocate(64)
    copy.save({"a": torch.ones(4)}, {})
    address = copy.tensors()["a"].data_ptr()
    copy.save({"a": torch.zeros(4)}, {})
    assert copy.tensors()["a"].data_ptr() == address
    assert copy.tensors()["a"].equal(torch.zeros(4))


def test_too_small_a_copy_says_by_how_much_and_keeps_what_it_held() -> None:
    copy = RollbackCopy.allocate(64)
    copy.save({"a": torch.ones(4)}, {})
    with pytest.raises(RollbackError, match="needs 128 bytes; it was given 64"):
        copy.save({"a": torch.zeros(32)}, {})
    assert copy.tensors()["a"].equal(torch.ones(4))


def test_a_copy_travels_through_a_weights_only_checkpoint() -> None:
    copy = RollbackCopy.allocate(256)
    copy.save({"a": torch.arange(3.0), "b": torch.tensor(2, dtype=torch.int32)}, {"cur_scale": 8.0})
    file = io.BytesIO()
    torch.save(copy.state_dict(), file)
    file.seek(0)
    other = RollbackCopy.allocate(256)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.values() == {"cur_scale": 8.0}
    assert other.tensors()["a"].equal(torch.arange(3.0))
    assert other.tensors()["b"].equal(torch.tensor(2, dtype=torch.int32))


@pytest.mark.parametrize(
    "buffer", [torch.empty(8), torch.empty(2, 4, dtype=torch.uint8), torch.empty(8, dtype=torch.uint8)[::2]]
)
def test_a_buffer_must_be_flat_bytes(buffer: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="must be flat uint8"):
        RollbackCopy(buffer)


def test_adam_needs_twelve_bytes_per_parameter() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1 << 16))
    optimizer = torch.optim.AdamW([parameter])
    state = OptimizerState([optimizer], None)
    before_first_step = state.num_bytes(whole_masters([parameter]))
    step(optimizer, parameter)
    assert before_first_step == state.num_bytes(whole_masters([parameter]))
    assert 12 <= state.num_bytes(whole_masters([parameter])) / parameter.numel() < 12.01


def test_state_made_after_the_capture_is_removed() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter])
    state = OptimizerState([optimizer], None)
    copy = RollbackCopy.allocate(state.num_bytes(whole_masters([parameter])))
    state.capture(whole_masters([parameter]), copy)
    step(optimizer, parameter)
    with torch.no_grad():
        state.restore(whole_masters([parameter]), copy)
    assert parameter not in optimizer.state
    assert parameter.detach().equal(torch.ones(4))


def test_restored_adam_steps_as_it_would_have() -> None:
    optimizer, parameter = stepped_adam()
    state = OptimizerState([optimizer], None)
    copy = RollbackCopy.allocate(state.num_bytes(whole_masters([parameter])))
    with torch.no_grad():
        state.capture(whole_masters([parameter]), copy)
    step(optimizer, parameter)
    expected = parameter.detach().clone()
    step(optimizer, parameter)
    with torch.no_grad():
        state.restore(whole_masters([parameter]), copy)
    step(optimizer, parameter)
    assert parameter.detach().equal(expected)


def test_an_empty_copy_or_one_of_other_tensors_restores_nothing() -> None:
    optimizer, parameter = stepped_adam()
    state = OptimizerState([optimizer], None)
    copy = RollbackCopy.allocate(state.num_bytes(whole_masters([parameter])))
    before = parameter.detach().clone()
    with pytest.raises(RollbackError, match="nothing was restored"):
        state.restore(whole_masters([parameter]), copy)
    state.capture(whole_masters([torch.zeros(5)]), copy)
    with pytest.raises(RollbackError, match="nothing was restored"):
        state.restore(whole_masters([parameter]), copy)
    assert parameter.detach().equal(before)


class FailingCopy(RollbackCopy):
    """Memory whose pages can be had until a test says otherwise.

    Attributes:
        asked: First byte and number of bytes of the pages that were asked for.
    """

    is_gone = False

    def __init__(self, buffer: torch.Tensor) -> None:
        super().__init__(buffer)
        self.asked: list[tuple[int, int]] = []

    def _require_pages(self, offset: int, num_bytes: int, *, for_writing: bool) -> None:
        self.asked.append((offset, num_bytes))
        if self.is_gone:
            raise RollbackError("no pages")


def test_pages_are_asked_for_before_a_rollback_and_not_during_it() -> None:
    optimizer, parameter = stepped_adam()
    state = OptimizerState([optimizer], None)
    copy = FailingCopy.allocate(state.num_bytes(whole_masters([parameter])))
    assert isinstance(copy, FailingCopy)
    before = parameter.detach().clone()
    with torch.no_grad():
        state.capture(whole_masters([parameter]), copy)
    step(optimizer, parameter)
    with torch.no_grad():
        after = parameter.detach().clone()
        state.require_restorable(whole_masters([parameter]), copy)
        copy.is_gone = True
        # One rank refuses before all agree, or none does.
        with pytest.raises(RollbackError, match="no pages"):
            state.require_restorable(whole_masters([parameter]), copy)
        assert parameter.detach().equal(after)
        state.restore(whole_masters([parameter]), copy)
    assert parameter.detach().equal(before)


def test_a_rollback_needs_the_pages_up_to_the_last_place_held() -> None:
    copy = FailingCopy.allocate(1 << 16)
    assert isinstance(copy, FailingCopy)
    copy.save({"a": torch.ones(4), "b": torch.ones(3)}, {})
    copy.asked.clear()
    copy.require_readable()
    assert copy.asked == [(0, 64 + 12)]


@pytest.mark.parametrize(
    ("make", "momentum"),
    [
        (lambda parameter: torch.optim.AdamW([parameter], lr=0.1), "exp_avg"),
        (lambda parameter: torch.optim.SGD([parameter], lr=0.1, momentum=0.9), "momentum_buffer"),
    ],
    ids=["adamw", "sgd"],
)
def test_moments_are_scaled_or_reset_and_undone_bit_for_bit(
    make: Callable[[torch.nn.Parameter], torch.optim.Optimizer], momentum: str
) -> None:
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 33))
    optimizer = make(parameter)
    step(optimizer, parameter)
    state = OptimizerState([optimizer], None)
    copy = RollbackCopy.allocate(state.num_bytes(whole_masters([parameter])))
    before = {key: value.clone() for key, value in optimizer.state[parameter].items()}
    with torch.no_grad():
        state.capture(whole_masters([parameter]), copy)
        state.scale_momentum(whole_masters([parameter]), 0.25)
        now = optimizer.state[parameter]
        assert now[momentum].equal(before[momentum] * 0.25)
        assert all(now[key].equal(before[key]) for key in before if key != momentum)
        state.reset_moments(whole_masters([parameter]))
        assert all(not value.any() for value in now.values())
        assert all(before[key].any() for key in before)
        state.restore(whole_masters([parameter]), copy)
    assert all(optimizer.state[parameter][key].equal(before[key]) for key in before)


def test_a_step_counter_that_is_a_number_is_reset_too() -> None:
    optimizer, parameter = stepped_adam()
    optimizer.state[parameter]["step"] = 7
    OptimizerState([optimizer], None).reset_moments(whole_masters([parameter]))
    assert optimizer.state[parameter]["step"] == 0


def test_the_learning_rate_of_every_group_is_told() -> None:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": rate} for rate in (0.5, 0.25)]
    assert OptimizerState([torch.optim.AdamW(groups)], None).learning_rates() == (0.5, 0.25)


def test_a_step_waits_for_the_copies_that_were_begun_before_it_and_only_that_one() -> None:
    """A hook that removes itself fails where another comes after it, as those of modules (pytorch issue 60132)."""
    optimizer, parameter = stepped_adam()
    seen: list[torch.Tensor] = []
    before = parameter.detach().clone()
    state = OptimizerState([optimizer], None)
    state.before_next_step(lambda: seen.append(parameter.detach().clone()))
    # Somebody else's, which torch comes to after ours.
    optimizer.register_step_pre_hook(lambda *_: None)
    for _ in range(2):
        step(optimizer, parameter)
    assert len(seen) == 1
    assert seen[0].equal(before)
    num_hooks = len(optimizer._optimizer_step_pre_hooks)
    for _ in range(3):
        state.before_next_step(lambda: None)
        step(optimizer, parameter)
    assert len(optimizer._optimizer_step_pre_hooks) == num_hooks


def test_a_grad_scalers_scale_and_growth_go_back_too() -> None:
    master = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    state = OptimizerState([torch.optim.SGD([master], lr=0.1)], scaler)
    scaler.scale(torch.ones(()))
    copy = RollbackCopy.allocate(1 << 10)
    before = scaler.state_dict()
    state.capture(whole_masters([master]), copy)
    scaler.update(new_scale=2.0)
    state.restore(whole_masters([master]), copy)
    assert scaler.state_dict() == before
    assert before["scale"] == 8.0
