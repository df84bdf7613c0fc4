"""Couriers that die, stand still or end: the rank goes on, and nothing that matters is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.hook.messenger import Died
from sidecast.trainer.pipe.apply_log import read_delta, read_log
from sidecast.trainer.pipe.channel import Channel
from sidecast.trainer.pipe.messages import TO_HOOK, Connected, Prediction, Stats, ToCourier, ToHook, Totals
from tests.support.courier_calls import applied, predicted, stage
from tests.support.courier_harness import settings, start_courier, until
from tests.support.limits import HANG_S
from tests.support.services.harness import MANIFEST, RunningService, state

ALL = [(0, 0, 15), (1, 0, 40_000)]
STATS = Stats(totals=Totals(), step=0, loss=None, suspended=False, train_s=0.0, num_courier_deaths=0)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    with RunningService(tmp_path / "service") as running:
        yield running


@pytest.fixture
def courier(service: RunningService, tmp_path: Path) -> Iterator[CourierHandle]:
    handle = start_courier(settings(service.endpoint, MANIFEST, ALL, record_dir=tmp_path / "record"))
    try:
        assert until(handle, Connected).session_id == "s1"
        yield handle
    finally:
        handle.close()


def kill(courier: CourierHandle) -> None:
    process = courier._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_courier_is_replaced_and_a_held_prediction_stays(courier: CourierHandle, tmp_path: Path) -> None:
    predicted(courier)
    expected = (state(2) - state(1)).tobytes()
    kill(courier)
    assert until(courier, Died).reason == "the courier ended with status -9"
    until(courier, Connected)
    assert courier.num_deaths == 1
    assert bytes(courier.prediction.view) == expected
    assert courier.held is not None
    courier.release_prediction(applied(24))
    courier.close()
    (entry,) = read_log(tmp_path / "record", 0)
    assert read_delta(tmp_path / "record", entry, len(expected)) == expected


def test_a_death_is_told_although_it_was_a_post_that_noticed_it(courier: CourierHandle) -> None:
    kill(courier)
    assert not courier.post(STATS)
    assert until(courier, Died).reason == "the courier ended with status -9"
    until(courier, Connected)
    assert courier.num_deaths == 1


def test_only_deaths_without_a_prediction_in_between_end_nowcasting(
    courier: CourierHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecast.trainer.hook.courier_handle.MAX_DEATHS_IN_A_ROW", 1)
    kill(courier)
    until(courier, Connected)
    predicted(courier)
    kill(courier)
    until(courier, Connected)
    kill(courier)
    until(courier, Died)
    assert not courier.is_alive
    assert courier.num_deaths == 3


def test_an_applied_jump_is_recorded_although_the_courier_dies_before_it_hears_of_it(
    courier: CourierHandle, tmp_path: Path
) -> None:
    predicted(courier)
    process = courier._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    courier.release_prediction(applied(24))
    kill(courier)
    until(courier, Connected)
    courier.close()
    assert [entry["step"] for entry in read_log(tmp_path / "record", 0)] == [24]


def test_a_stopped_courier_never_blocks_and_loses_nothing_that_matters(courier: CourierHandle) -> None:
    predicted(courier)
    process = courier._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    try:
        are_posted = [courier.post(replace(STATS, step=step), may_be_lost=True) for step in range(20_000)]
        assert are_posted[0]
        assert not all(are_posted)
        courier.release_prediction(None)
        stage(courier, 3, 30)
        stage(courier, 4, 40)
        assert courier.take_slot() is None
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert until(courier, Prediction).version == 2
    assert courier.num_deaths == 0


def test_a_stopped_courier_does_not_hang_the_end_of_training(courier: CourierHandle) -> None:
    process = courier._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    # It returns although the courier hears nothing, and whatever is done to it later.
    courier.close()
    assert process.returncode == -signal.SIGKILL


def test_an_end_leaves_no_process(courier: CourierHandle) -> None:
    process = courier._process
    assert process is not None
    courier.close()
    assert process.returncode == 0
    courier.close()


def test_a_courier_that_does_not_understand_its_rank_says_why_in_one_line_and_ends() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel[ToCourier, ToHook](ours, TO_HOOK).send(STATS)
        result = subprocess.run(
            [sys.executable, "-m", "sidecast.trainer.courier", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            capture_output=True,
            text=True,
            timeout=HANG_S,
            check=False,
        )
    assert result.returncode == 1
    assert result.stderr == "sidecast courier: a rank introduces itself to its courier first, not with Stats\n"
