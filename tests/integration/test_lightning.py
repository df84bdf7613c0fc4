"""The Lightning callback: harmless while nothing is applied, and resumed bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sidecast.nowcaster_service.nowcasting import NowcastAnswer
from tests.support.service_harness import RunningService

pytest.importorskip("lightning")

from tests.integration.workers.lightning_runs import PERIOD_STEPS, SAVE_STEP, section, train


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("service")) as running:
        yield running


def test_nothing_applied_changes_nothing(service: RunningService) -> None:
    service.engines.answer = NowcastAnswer(refusal="not today")
    try:
        losses, events, weights = train(section(service.endpoint))
    finally:
        service.engines.answer = None
    assert [step for kind, step in events if kind == "failed"] == [PERIOD_STEPS, 2 * PERIOD_STEPS]
    plain_losses, _, plain_weights = train(None)
    assert losses == plain_losses
    assert torch.equal(weights, plain_weights)


def test_a_resumed_run_equals_the_uninterrupted_one(service: RunningService, tmp_path: Path) -> None:
    settings = section(service.endpoint)
    losses, events, weights = train(settings)
    assert [step for kind, step in events if kind == "applied"] == [PERIOD_STEPS, 2 * PERIOD_STEPS]
    checkpoint = tmp_path / "middle.ckpt"
    train(settings, num_steps=SAVE_STEP, save=checkpoint)
    later_losses, later_events, later_weights = train(settings, load=checkpoint)
    verdicts = [
        event for event in events if event[0] in ("accepted", "rolled_back", "applied") and event[1] > SAVE_STEP
    ]
    assert [event for event in later_events if event[0] in ("accepted", "rolled_back", "applied")] == verdicts
    assert later_losses == losses[2 * SAVE_STEP :]
    assert torch.equal(later_weights, weights)
