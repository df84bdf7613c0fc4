"""Work on several threads: results in order, little of it ahead of who takes them, and no more of it after an error."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from sidecast.predictors.passes import ordered_map
from tests.support.limits import HANG_S


def test_results_come_in_the_order_of_the_arguments() -> None:
    second_is_done = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            assert second_is_done.wait(HANG_S)
        if number == 1:
            second_is_done.set()
        return number * number

    assert list(ordered_map(work, range(500), 2)) == [number * number for number in range(500)]


def test_few_arguments_are_taken_ahead_of_the_results() -> None:
    num_taken = 0

    def arguments() -> Iterator[int]:
        nonlocal num_taken
        for number in range(10_000):
            num_taken += 1
            yield number

    results = ordered_map(lambda number: number, arguments(), 2)
    assert next(results) == 0
    assert num_taken <= 32
    results.close()  # type: ignore[attr-defined]
    assert num_taken <= 32


def test_an_error_is_raised_and_what_has_not_begun_is_left_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    done, gives_up = [], threading.Event()
    cancel = Future.cancel

    def cancelling(future: Future[int]) -> bool:
        is_cancelled = cancel(future)
        gives_up.set()
        return is_cancelled

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        if number > 3:
            gives_up.wait(1)
        done.append(number)
        return number

    monkeypatch.setattr(Future, "cancel", cancelling)
    with pytest.raises(ValueError, match="three"):
        list(ordered_map(work, range(10_000), 2))
    assert len(done) < 30
