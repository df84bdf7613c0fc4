"""The token bucket, by a clock that only its own sleeps move."""

from __future__ import annotations

import pytest

from sidecast.trainer.courier.throttle import BURST_S, Throttle


class Time:
    def __init__(self) -> None:
        self.now_s = 50.0
        self.sleeps: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now_s += seconds


def throttle(time: Time, bytes_per_s: float | None) -> Throttle:
    return Throttle(bytes_per_s, clock=time.clock, sleep=time.sleep)


def test_a_transfer_takes_the_time_that_its_rate_means() -> None:
    time = Time()
    bucket = throttle(time, 1000.0)
    for _ in range(50):
        bucket.pass_bytes(100)
    assert time.now_s - 50.0 == pytest.approx(50 * 100 / 1000.0, abs=BURST_S)
    # It slept between the chunks and did not look at the clock over and over.
    assert len(time.sleeps) <= 50


def test_a_pause_saves_up_no_more_than_a_burst() -> None:
    time = Time()
    bucket = throttle(time, 1000.0)
    bucket.pass_bytes(1)
    time.now_s += 3600.0
    began_s = time.now_s
    bucket.pass_bytes(5000)
    assert time.now_s - began_s == pytest.approx(5.0 - BURST_S)


def test_without_a_limit_nothing_waits() -> None:
    time = Time()
    bucket = throttle(time, None)
    bucket.pass_bytes(10**12)
    assert time.sleeps == []
    assert bucket.least_s(10**12) == 0.0
    assert throttle(time, 1000.0).least_s(5000) == 5.0
