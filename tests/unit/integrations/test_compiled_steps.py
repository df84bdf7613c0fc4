"""Steps that scripts compile with all their hooks (torchtune issue 2516): they are seen, and never end a script."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import sidecast
from sidecast.trainer.integrations import plain_loop
from tests.unit.integrations.test_plain_loop import FakeAttachment, attached


class Uncompilable(FakeAttachment):
    """Does what no graph can hold."""

    def after_step(self) -> None:
        assert not torch.compiler.is_compiling()
        super().after_step()


@pytest.fixture(autouse=True)
def _graphs_of_before() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def compiled(step: Callable[[], Any]) -> Callable[[], Any]:
    # The graphs are as they are with any backend, and no compiler is run.
    return torch.compile(step, backend="eager")


def test_a_compiled_step_of_a_loop_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_loop, "start", Uncompilable)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1))
    sidecast.attach(model, optimizer)
    # Whoever maps a model watches what its optimizer's steps change.
    attached(model).run.map_layout()
    before = model.weight.detach().clone()
    step = compiled(lambda: optimizer.step())
    for _ in range(3):
        model(torch.ones(4, 2)).square().mean().backward()
        step()
    assert attached(model).steps == [1, 2, 3]
    assert len(attached(model).losses) == 3
    assert not model.weight.equal(before)


def test_a_compiled_step_of_a_nowcast_optimizer_jumps() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    inner = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    optimizer = sidecast.NowcastOptimizer(
        inner, model, context_len=2, period_steps=4, max_relative_norm=1e3, probation_steps=0
    )
    events: list[Any] = []
    optimizer.hook.add_listener(lambda event: events.append((event.kind, event.step)))
    step = compiled(lambda: optimizer.step())
    for _ in range(5):
        model(torch.ones(4, 2)).square().mean().backward()
        step()
    optimizer.hook.close()
    assert ("applied", 4) in events
    assert optimizer.hook.step == 5
