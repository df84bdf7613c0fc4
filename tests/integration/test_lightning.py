"""The Lightning callback: harmless while nothing is applied, and resumed bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sidecast.nowcaster_service.nowcasting import NowcastAnswer
from tests.support.services.harness import RunningService

pytest.importorskip("lightning")

from lightning.pytorch.plugins.precision import MixedPrecision

from tests.integration.workers.lightning_runs import (
    NUM_STEPS,
    PERIOD_STEPS,
    SAVE_STEP,
    Collecting,
    Hiding,
    Manual,
    Overflowing,
    section,
    train,
    train_by_hand,
)


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


def test_scaled_losses_are_seen_as_they_are_and_skipped_steps_are_no_steps(service: RunningService) -> None:
    module = Overflowing()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=8)
    hook, seen = train_by_hand(module, section(service.endpoint), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert 0 < NUM_STEPS - module.num_moved < 20
    assert hook.step == module.num_moved
    assert seen == pytest.approx(module.losses, rel=1e-6)


def test_several_steps_for_each_batch_are_nowcasted_as_other_steps_are(service: RunningService) -> None:
    module, logger = Manual(), Collecting()
    hook, seen = train_by_hand(module, section(service.endpoint), logger=logger)
    assert hook.step == NUM_STEPS
    assert seen == module.losses
    summary = hook.summary()
    assert summary["num_staged"] == NUM_STEPS // (PERIOD_STEPS // 5)
    assert summary["num_applied"] == NUM_STEPS // PERIOD_STEPS
    assert [row["sidecast/num_applied"] for row in logger.rows][-1] == summary["num_applied"]


def test_without_losses_no_jump_is_made_and_one_warning_says_so(
    service: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    hook, seen = train_by_hand(Hiding(), section(service.endpoint))
    assert (seen, hook.step, hook.summary()["num_applied"]) == ([], NUM_STEPS, 0)
    assert caplog.text.count("no jump is applied as long as too few losses are seen") == 1
