"""kill -9 of a service, anywhere: the run that goes on is given what it would have been given without, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from tests.support.services.mortal import MortalService
from tests.support.services.steadfast_run import KINDS, Given, SteadfastRun

DEATH_STEP = 60


@pytest.fixture
def service() -> Iterator[MortalService]:
    running = MortalService()
    try:
        yield running
    finally:
        running.kill()
        shutil.rmtree(running.history.parent)


@pytest.fixture(scope="module")
def unharmed() -> Iterator[dict[str, Given]]:
    """What runs are given by a service that lives."""
    running = MortalService()
    given = {}
    for kind in KINDS:
        running.start()
        given[kind] = SteadfastRun(running, kind).train()
        running.kill()
        shutil.rmtree(running.history)
    yield given
    shutil.rmtree(running.history.parent)


ANYWHERE = [
    "in an upload",
    "between two ranks' commits",
    "before the record of a commit",
    "in the record of a commit",
    "after the record of a commit",
    "before publication",
    "after publication",
]


@pytest.mark.parametrize(
    ("kind", "death"),
    [
        *((kind, death) for kind in ("bf16", "push") for death in ANYWHERE),
        *((kind, "in the nowcast") for kind in ("fp32", "bf16")),
        ("fp32", "after the record of a commit"),
        ("push", "in the push"),
    ],
)
def test_a_killed_service_changes_nothing_that_a_run_is_given(
    service: MortalService, unharmed: dict[str, Given], kind: str, death: str
) -> None:
    service.start(death, DEATH_STEP)
    given = SteadfastRun(service, kind).train()
    assert service.num_deaths == 1
    assert given == unharmed[kind]
    assert len(given.predictions) == (8 if kind == "push" else 3)


@pytest.mark.parametrize("kind", ["bf16", "push"])
@pytest.mark.parametrize("again", ["while it looks at what is left", "when it goes on with what is left"])
def test_a_service_that_dies_while_it_restores_a_run_costs_no_more(
    service: MortalService, unharmed: dict[str, Given], kind: str, again: str
) -> None:
    service.start("after the record of a commit", DEATH_STEP)
    assert SteadfastRun(service, kind, [(again, 0)]).train() == unharmed[kind]
    assert service.num_deaths == 2


def test_an_interval_that_was_half_averaged_is_left_out_and_told_of(
    service: MortalService, unharmed: dict[str, Given]
) -> None:
    service.start("in the average", DEATH_STEP)
    given = SteadfastRun(service, "push").train()
    assert service.num_deaths == 1
    reason = f"the interval up to step {DEATH_STEP} is left out: the service has ended while it was being averaged"
    assert given.losses == [[reason], [reason]]
    steps = list(unharmed["push"].predictions)
    assert list(given.predictions) == [step for step in steps if step != DEATH_STEP]
    for step in steps[: steps.index(DEATH_STEP)]:
        assert given.predictions[step] == unharmed["push"].predictions[step]
