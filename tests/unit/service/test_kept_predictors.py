"""Predictors are kept for the runs that use them, not for ever, and the making of one holds up no other."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service import nowcasting
from sidecast.nowcaster_service.nowcasting import MAX_PREDICTORS, Nowcasting, PredictorRequest
from tests.support.limits import HANG_S

MANIFEST = ModelManifest.from_shapes([("w", (4,))], {"model_type": "toy"})


def request(**options: Any) -> PredictorRequest:
    return PredictorRequest(predictor="average", options=options, manifest_json=MANIFEST.to_json(), context_len=2)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was made so far."""
    made: list[Any] = []
    create = nowcasting.create_predictor

    def counting(*args: Any, **kwargs: Any) -> Any:
        made.append(create(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(nowcasting, "create_predictor", counting)
    return made


def test_those_used_last_are_kept(made: list[Any]) -> None:
    engine = Nowcasting(None)
    in_use = request()
    for index in range(3 * MAX_PREDICTORS):
        engine.check(in_use)
        engine.check(request(decay=0.1 + index / 1000))
    assert len(made) == 3 * MAX_PREDICTORS + 1
    assert len(engine._predictors) == MAX_PREDICTORS
    assert engine._being_made == {}


def test_one_that_takes_long_to_make_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, may_end = threading.Event(), threading.Event()
    create = nowcasting.create_predictor

    def slow(name: str, *, options: Any, **kwargs: Any) -> Any:
        if options:
            begun.set()
            assert may_end.wait(HANG_S)
        return create(name, options=options, **kwargs)

    monkeypatch.setattr(nowcasting, "create_predictor", slow)
    engine = Nowcasting(None)
    answers: list[Any] = []
    threads = [threading.Thread(target=lambda: answers.append(engine.check(request(decay=0.5)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert begun.wait(HANG_S)
    quick = threading.Thread(target=engine.check, args=(request(),))
    quick.start()
    quick.join(HANG_S)
    is_over = not quick.is_alive()
    may_end.set()
    for thread in (*threads, quick):
        thread.join(HANG_S)
    assert is_over
    # Those that needed the same shared it.
    assert [answer.refusal for answer in answers] == ["", ""]
    assert len(engine._predictors) == 2
