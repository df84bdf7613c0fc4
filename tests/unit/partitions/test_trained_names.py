"""Under which names, and whether at all, parameters are taken for trained ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sidecast.errors import ConfigError
from sidecast.trainer.partitions import Partition, RollbackCopy
from sidecast.trainer.partitions.deepspeed import _layout_of
from sidecast.trainer.partitions.plain import plain_layout
from sidecast.trainer.partitions.trainable import TrainedNames, tensors_now, trainable_parameters


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))


def test_names_are_those_of_the_model_without_wrappers(model: nn.Module) -> None:
    plain = [spec.fqn for spec in trainable_parameters(model, list(model.parameters())).specs]
    compiled = torch.compile(model)
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    found = trainable_parameters(compiled, list(compiled.parameters()))
    assert [spec.fqn for spec in found.specs] == plain == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert [id(item) for item in tensors_now(compiled, found, optimizer)] == [id(item) for item in found.tensors]


def test_what_was_trained_first_stays_the_choice(model: nn.Module) -> None:
    names, parameters = TrainedNames(), list(model.parameters())
    parameters[0].requires_grad_(False)
    first = names.select(model, parameters)
    parameters[0].requires_grad_(True)
    parameters[1].requires_grad_(False)
    assert names.select(model, parameters).specs == first.specs
    assert [spec.fqn for spec in first.specs] == ["0.bias", "1.weight", "1.bias"]


def test_a_parameter_that_is_not_the_models_is_refused_with_an_engine_too(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([*model.parameters(), nn.Parameter(torch.zeros(4, 4))], lr=0.1)
    with pytest.raises(ConfigError, match=r"parameter of shape \(4, 4\) that the model does not have"):
        _layout_of(model, optimizer, TrainedNames())


def test_running_statistics_that_no_jump_moves_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    names = TrainedNames()
    for _ in range(2):
        names.select(model, list(model.parameters()))
    (record,) = caplog.records
    assert "2 layers keep running statistics (1.running_mean, ...)" in record.getMessage()


def test_what_another_optimizer_may_train_is_named_once(model: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    """Muon takes matrices alone, and another optimizer the rest (pytorch pull request 160213)."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    names = TrainedNames()
    for _ in range(2):
        names.select(model, matrices)
    (record,) = caplog.records
    assert "2 parameters that ask for gradients are not in the optimizer (0.bias, ...)" in record.getMessage()
    caplog.clear()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 2)
    TrainedNames().select(model, matrices)
    assert caplog.records == []


def test_a_jump_leaves_alone_what_is_frozen_now_and_a_rollback_does_not(model: nn.Module) -> None:
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    partition = Partition(lambda: plain_layout(model, optimizer))
    copy = RollbackCopy.allocate(partition.rollback_bytes())
    partition.capture(copy)
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[1].requires_grad_(False)
    partition.apply(torch.ones(sum(parameter.numel() for parameter in parameters)), 1.0)
    moved = [not torch.equal(now, then) for now, then in zip(parameters, before, strict=True)]
    assert moved == [True, False, True, True]
    with torch.no_grad():
        parameters[1].zero_()
    partition.restore(copy)
    assert all(torch.equal(now, then) for now, then in zip(parameters, before, strict=True))
