"""What a run's log and its loggers are told."""

from __future__ import annotations

import logging

import pytest

from sidecast.trainer.integrations.loggers import log_numbers, numbers_of
from tests.support.optimizer_training import PERIOD_STEPS, Training


def test_every_event_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    training = Training()
    with caplog.at_level(logging.INFO, "sidecast"):
        training.train(PERIOD_STEPS)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert [line.split()[:4] for line in lines] == [
        ["step", f"{step}:", "jump", kind] for kind, step in training.events
    ]
    (applied,) = [line for line in lines if " applied " in line]
    assert applied.startswith(f"step {PERIOD_STEPS}: jump applied (version 1, base_step {PERIOD_STEPS}, ")
    assert ", weight 1, " in applied


def test_numbers_are_those_of_the_summary_at_every_event_that_changes_them() -> None:
    training = Training(probation_steps=10)
    written: list[dict[str, float]] = []
    hook = training.optimizer.hook
    log_numbers(hook, written.append)
    training.train(PERIOD_STEPS)
    # How long a boundary has kept training waiting is known once it is over.
    before = {"sidecast/blocked_s": written[-1]["sidecast/blocked_s"]}
    assert written[-1] == numbers_of(hook) | before
    assert written[-1]["sidecast/num_applied"] == 1
    assert 0 < before["sidecast/blocked_s"] < hook.summary()["blocked_s"]
    num_before = len(written)
    training.train(10)
    assert len(written) - num_before == sum(
        kind in ("committed", "accepted", "rolled_back") and step > PERIOD_STEPS for kind, step in training.events
    )
    assert written[-1]["sidecast/num_accepted"] + written[-1]["sidecast/num_rolled_back"] == 1


def test_a_logger_that_fails_ends_no_step_and_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """On the rank that logs alone, it would: the others would wait for it for ever."""
    training = Training(probation_steps=10)
    num_tries = 0

    def write(_: dict[str, float]) -> None:
        nonlocal num_tries
        num_tries += 1
        raise ConnectionError("no route to the tracking server")

    log_numbers(training.optimizer.hook, write)
    training.train(PERIOD_STEPS + 10)
    assert num_tries > 1
    assert caplog.text.count("numbers cannot be logged: no route to the tracking server") == 1
