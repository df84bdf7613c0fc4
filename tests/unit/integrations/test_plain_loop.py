"""``attach`` in a plain loop: which steps count, what is refused, and what a checkpoint's folder keeps."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.nn.parallel import DistributedDataParallel

import sidecast
from sidecast.errors import ConfigError
from sidecast.trainer.integrations import plain_loop
from sidecast.trainer.integrations.state_files import STATE_FILE


class FakeAttachment:
    """Notes what it is told of a run."""

    def __init__(self, section: Any, run: Any) -> None:
        self.section, self.run = section, run
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.resumed: list[Any] = []
        self.num_skipped = 0
        self.hook = SimpleNamespace(is_closed=False, after_skipped_step=self._skip)

    def _skip(self) -> None:
        self.num_skipped += 1

    def after_step(self) -> None:
        self.steps.append(self.run.applied_steps())

    def observe(self, loss: Any) -> None:
        self.losses.append(float(loss))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.run.applied_steps()}

    def save_rollback_copy(self, folder: Path) -> None:
        pass

    def from_first(self, value: Any) -> Any:
        return value

    def resume(self, state: Any, folder: Path) -> None:
        self.resumed.append((state, folder, self.run.applied_steps()))


@pytest.fixture(autouse=True)
def _no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_loop, "start", FakeAttachment)


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))


@pytest.fixture
def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.1)


def attached(model: nn.Module) -> Any:
    loop = plain_loop.loop_of(model)
    assert loop is not None
    return loop.attachment


def train(model: nn.Module, optimizer: Any, num_steps: int) -> list[float]:
    losses = []
    for _ in range(num_steps):
        loss = model(torch.ones(4, 2)).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_every_step_and_loss_is_told(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert sidecast.attach(model, optimizer, {"period_steps": 20}) is model
    losses = train(model, optimizer, 3)
    fake = attached(model)
    assert fake.section == {"period_steps": 20}
    assert fake.steps == [1, 2, 3]
    assert fake.losses == pytest.approx(losses)
    assert sidecast.hook_of(model) is fake.hook
    assert (fake.run.stage, fake.run.local_rank) == ("none", 0)


def test_the_state_that_a_distributed_checkpoint_makes_is_no_step(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    sidecast.attach(model, optimizer)
    get_state_dict(model, optimizer)
    assert optimizer.state
    assert attached(model).steps == []
    train(model, optimizer, 2)
    assert attached(model).steps == [1, 2]


def test_a_step_within_that_of_a_subclass_is_no_other_step(model: nn.Module) -> None:
    class Clipping(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            return super().step(closure)

    # Torch tells of the steps of a class once there is an optimizer of that class itself.
    torch.optim.AdamW(model.parameters())
    optimizer = Clipping(model.parameters())
    sidecast.attach(model, optimizer)
    get_state_dict(model, optimizer)
    train(model, optimizer, 3)
    assert attached(model).steps == [1, 2, 3]


def test_what_others_derive_after_a_step_is_of_what_a_jump_has_made(model: nn.Module) -> None:
    optimizer, told = torch.optim.SGD(model.parameters(), lr=0.1), []
    # As scripts do that give FSDP2 an event to wait on.
    optimizer.register_step_post_hook(lambda *_: told.append(list(attached(model).steps)))
    sidecast.attach(model, optimizer)
    train(model, optimizer, 2)
    assert told == [[1], [1, 2]]


def test_a_step_that_a_fused_optimizer_leaves_out_is_told_as_such(model: nn.Module) -> None:
    optimizer, scaler = torch.optim.AdamW(model.parameters(), fused=True), torch.amp.GradScaler("cpu", init_scale=8.0)
    sidecast.attach(model, optimizer)
    for factor in (1.0, torch.inf, 2.0):
        loss = model(torch.ones(4, 2)).square().mean() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert (attached(model).steps, attached(model).num_skipped) == ([1, 2], 1)


def test_an_optimizer_that_another_one_has_replaced_is_told_of_once(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As fastai's learner makes one anew whenever layers are unfrozen (fastai issue 2133)."""
    monkeypatch.setattr(plain_loop, "MANY_LOSSES", 4)
    sidecast.attach(model, optimizer)
    for _ in range(2):
        # Gradients that are accumulated are steps to come.
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2)
        train(model, optimizer, 1)
    assert caplog.records == []
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 7)
    (record,) = caplog.records
    assert "the optimizer that sidecast.attach was given has made no step in 4 backward passes" in record.getMessage()
    assert attached(model).steps == [1, 2]
    assert len(attached(model).losses) == 13


def test_wrappers_are_looked_through(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    prepared: Any = type("AcceleratedOptimizer", (), {"__module__": "accelerate.optimizer", "optimizer": optimizer})()
    sidecast.attach(wrapper, prepared)
    # Whichever of the two somebody has at hand later.
    assert sidecast.hook_of(model) is sidecast.hook_of(wrapper) is attached(wrapper).hook
    names = [spec.fqn for spec in attached(wrapper).run.map_layout().trainable.specs]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
    optimizer.step()
    assert attached(wrapper).steps == [1]


def test_where_it_is_disabled_nothing_is_touched(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    assert sidecast.attach(model, optimizer, {"enabled": False}) is model
    assert sidecast.hook_of(model) is None
    assert not model._forward_hooks
    sidecast.save_nowcasting(model, "/nowhere")
    sidecast.resume_nowcasting(model, "/nowhere")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear(1, 1),), "Linear is no DeepSpeed engine; pass .* or a module with its optimizer: sidecast.attach"),
        ((nn.Linear(1, 1), None, {}), r"was given settings and no optimizer; allowed: attach\(model, optimizer, sett"),
        ((nn.Linear(1, 1), [1]), "the optimizer is a list; allowed: one torch.optim.Optimizer"),
        (
            (torch.ones(1), torch.optim.SGD([torch.ones(1)])),
            "the model is a Tensor; allowed: a torch.nn.Module",
        ),
    ],
)
def test_what_cannot_be_attached_to_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sidecast.attach(*arguments)


def test_an_optimizer_within_another_is_not_taken_for_it(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    around: Any = SimpleNamespace(optimizer=optimizer)
    with pytest.raises(ConfigError, match=r"the optimizer is a SimpleNamespace; allowed: one torch.optim.Optimizer"):
        sidecast.attach(model, around)


def test_processes_that_do_not_know_of_each_other_are_refused(
    model: nn.Module, optimizer: torch.optim.Optimizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 2, .* after torch.distributed.init_process_group"):
        sidecast.attach(model, optimizer)
    monkeypatch.setenv("WORLD_SIZE", "1")
    sidecast.attach(model, optimizer)


def test_after_the_end_of_one_there_may_be_another(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    sidecast.attach(model, optimizer)
    first = attached(model)
    first.hook.is_closed = True
    other = torch.optim.SGD(model.parameters(), lr=0.1)
    sidecast.attach(model, other)
    assert attached(model) is not first
    other.step()
    assert attached(model).steps == [1]
    assert len(model._forward_hooks) == 1
    assert not optimizer._optimizer_step_post_hooks


def test_a_closed_one_watches_no_losses(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    sidecast.attach(model, optimizer)
    attached(model).hook.is_closed = True
    train(model, optimizer, 1)
    assert not model._forward_hooks
    assert attached(model).steps == []


def test_twice_is_refused(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    sidecast.attach(model, optimizer)
    with pytest.raises(ConfigError, match="twice"):
        sidecast.attach(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ConfigError, match="twice"):
        sidecast.attach(nn.Linear(1, 1), optimizer)


def test_a_checkpoints_folder_brings_back_the_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tmp_path: Path
) -> None:
    sidecast.attach(model, optimizer)
    train(model, optimizer, 3)
    folder = tmp_path / "new" / "checkpoint"
    sidecast.save_nowcasting(model, folder)
    assert json.loads((folder / STATE_FILE).read_text()) == {"step": 3}
    train(model, optimizer, 2)
    sidecast.resume_nowcasting(model, folder)
    assert attached(model).resumed == [({"step": 3}, folder, 3)]
    train(model, optimizer, 1)
    assert attached(model).steps == [1, 2, 3, 4, 5, 4]


def test_a_folder_without_nowcasting_is_a_new_beginning_with_a_warning(
    model: nn.Module, optimizer: torch.optim.Optimizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sidecast.attach(model, optimizer)
    train(model, optimizer, 1)
    sidecast.resume_nowcasting(model, tmp_path)
    assert attached(model).resumed == [(None, tmp_path, 1)]
    assert caplog.text.count("nowcasting begins anew") == 1


def test_a_folder_that_cannot_be_made_costs_itself(
    model: nn.Module, optimizer: torch.optim.Optimizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sidecast.attach(model, optimizer)
    (tmp_path / "file").write_text("")
    sidecast.save_nowcasting(model, tmp_path / "file" / "checkpoint")
    assert caplog.text.count("begins its nowcasting anew") == 1


def test_copies_are_not_nowcasted_and_what_is_dropped_is_freed(optimizer: torch.optim.Optimizer) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sidecast.attach(model, optimizer)
    for other in (copy.deepcopy(model), copy.deepcopy(optimizer)):
        assert sidecast.hook_of(other) is None
        assert plain_loop._LOOP_ATTRIBUTE not in vars(other)
    references = [weakref.ref(each) for each in (model, optimizer, attached(model))]
    del model, optimizer, other
    gc.collect()
    assert [reference() for reference in references] == [None, None, None]
