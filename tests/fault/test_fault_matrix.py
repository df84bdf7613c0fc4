"""Every fault that we could think of, one after another, in one training run: it goes on, unharmed, and heals."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fault_run import STOP_S, FaultRun, Outcome
from faults import Call, Fault, Phase

HERE = Path(__file__).resolve().parent


class Runs:
    """One run that goes from fault to fault, and another one after a fault that it did not come through.

    Args:
        folder: For all of them.
        transfers: How snapshots and predictions travel: settings of the hook.
    """

    def __init__(self, folder: Path, **transfers: str) -> None:
        self._folder = folder
        self._transfers = transfers
        self._num_runs = 0
        self._run: FaultRun | None = None

    def lend(self) -> Iterator[FaultRun]:
        """A run that is well, for one test; it is ended if it is not well afterwards."""
        if self._run is None:
            folder = self._folder / f"run{self._num_runs}"
            folder.mkdir()
            self._num_runs += 1
            self._run = FaultRun(folder, **self._transfers)
        try:
            if not self._run.is_well:
                unharmed(self._run, self._run.pass_through(None))
            yield self._run
        finally:
            if not self._run.is_well:
                self.close()

    def close(self) -> None:
        if self._run is not None:
            self._run.close()
            self._run = None


@contextmanager
def runs_in(folder: Path, **transfers: str) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        # Of the process that all others are forked from, when it starts.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        runs = Runs(folder, **transfers)
        try:
            yield runs
        finally:
            runs.close()


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """States travel whole, as bytes."""
    with runs_in(tmp_path_factory.mktemp("faults"), shared_memory="off") as runs:
        yield runs


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Memory is shared, and where it is not, changes travel in bf16."""
    with runs_in(tmp_path_factory.mktemp("short"), shared_memory="auto", wire_dtype="bf16_delta") as runs:
        yield runs


@pytest.fixture
def run(plain_runs: Runs) -> Iterator[FaultRun]:
    yield from plain_runs.lend()


@pytest.fixture
def short_run(short_runs: Runs) -> Iterator[FaultRun]:
    yield from short_runs.lend()


def unharmed(run: FaultRun, outcome: Outcome, state_error: float = 0.0) -> None:
    """Training is alive, all ranks are equal, and whatever was applied is what the service published.

    Args:
        run: Of which.
        outcome: What became of it.
        state_error: How far the states that were predicted from may be from those that were trained, as a share of the
            change that travelled.
    """
    for rank, passage in enumerate(outcome.passages):
        assert passage.last_step > passage.first_step
        assert passage.losses_are_finite
        assert passage.masters_are_published
        assert passage.healing_step is not None
        assert passage.applied[-1]["base_step"] >= passage.healing_step
        for jump in passage.applied:
            assert jump["delta"] == run.published_checksum(jump["digest"], rank)
            assert jump["state_error"] <= state_error
    first, second = outcome.passages
    assert first.weights == second.weights
    for name in ("step", "version", "digest", "base_step", "weight"):
        assert [jump[name] for jump in first.applied] == [jump[name] for jump in second.applied]
    run.is_well = True


def killed_services() -> Iterator[Fault]:
    # Where all ranks call, the second one is chosen; a vote is struck from the first.
    ranks = {"Upload": 1, "Commit": 1, "Fetch": 1, "Vote": 0}
    calls: tuple[Call, ...] = ("Open", "Upload", "Commit", "Predict", "Fetch", "Vote")
    phases: tuple[Phase, ...] = ("before", "during", "after")
    for call in calls:
        for phase in phases:
            yield Fault(what="kill the service", call=call, phase=phase, rank=ranks.get(call), seen="disconnected")


DIED = "the courier ended with status -9"


def killed_couriers() -> Iterator[Fault]:
    for call, phase, rank, victims in (
        ("Upload", "before", 0, (0,)),
        ("Upload", "during", 1, (1,)),
        ("Commit", "during", None, (0, 1)),
        ("Commit", "after", 1, (1,)),
        ("Predict", "during", None, (0, 1)),
        ("Fetch", "before", 0, (0,)),
        ("Fetch", "during", 1, (1,)),
        ("Fetch", "after", 0, (0,)),
        ("Vote", "before", 1, (1,)),
        ("Vote", "during", 0, (0, 1)),
        ("Vote", "after", 1, (1,)),
    ):
        yield Fault(what="kill couriers", call=call, phase=phase, rank=rank, victims=victims, seen=DIED)


ALTERED_UPLOADS = [
    Fault(what="duplicate", call="Upload", rank=1),
    Fault(what="reorder", call="Upload", rank=1),
    Fault(what="corrupt", call="Upload", rank=1),
    # Once more than it is tried.
    Fault(what="corrupt", call="Upload", rank=1, times=3, seen="fails its checksum"),
    Fault(what="truncate a chunk", call="Upload", rank=1, seen="a message that is not a Chunk"),
    Fault(what="truncate the stream", call="Upload", rank=1, seen="has a gap at byte"),
    Fault(what="lose a chunk", call="Upload", rank=1, seen="has a gap at byte"),
    Fault(what="too many chunks", call="Upload", rank=1, seen="are outside this rank's buffer"),
    Fault(what="forge", call="Upload", rank=1, seen="does not have the digest that it committed"),
]
ALTERED_FETCHES = [
    Fault(what="corrupt", call="Fetch", rank=1),
    Fault(what="corrupt", call="Fetch", rank=1, times=3, seen="fails its checksum"),
    Fault(what="duplicate", call="Fetch", rank=1, times=3, seen="came at"),
    Fault(what="reorder", call="Fetch", rank=1, times=3, seen="came at"),
    Fault(what="truncate a chunk", call="Fetch", rank=1),
    Fault(what="truncate the stream", call="Fetch", rank=1, times=3, seen="did not come"),
    Fault(what="lose a chunk", call="Fetch", rank=1, times=3, seen="came at"),
    Fault(what="too many chunks", call="Fetch", rank=1),
]
ALTERED_PREDICTIONS = [
    Fault(what="predict NaN", call="Predict", seen="the prediction is not finite: first in"),
    Fault(what="predict too large a jump", call="Predict", seen="the jump's relative norm is"),
    Fault(what="predict another shape", call="Predict", seen="the predictor failed"),
    Fault(what="send NaN", call="Fetch", rank=1, seen="the prediction is not finite"),
    Fault(what="another version", call="Fetch", rank=1, times=3, seen="fails its checksum or version"),
    Fault(what="announce another version", call="Watch", rank=1, seen="is not published"),
    # Both ranks hold something, and wait in vain for the other to hold the same.
    Fault(what="announce another digest", call="Watch", rank=1, seen="steps old"),
    Fault(what="delay", call="Predict", phase="after", seen="steps old"),
    Fault(what="refuse", call="Fetch", rank=1, seen="refused by the test"),
]
FULL_DISKS = [
    Fault(what="fill the disk", call="Upload", phase="before", seen="dropped: no room for"),
    # The nowcast finds no room; where the machine was too slow for a whole window, the next snapshot does.
    Fault(what="fill the disk", call="Commit", is_at_base=True, seen="no room for"),
    Fault(what="fill the record disk", call="Vote", rank=0, victims=(0,), logged="can no longer be replayed"),
]


REFUSED_MEMORY = [
    Fault(what="refuse the memory", call="Share", phase="before", times=2, logged="not taken: refused by the test"),
]
ALTERED_CHANGES = [
    Fault(what="corrupt", call="Upload", rank=1, way="bf16"),
    Fault(what="corrupt", call="Upload", rank=1, way="bf16", times=3, seen="fails its checksum"),
    Fault(what="duplicate", call="Upload", rank=1, way="bf16"),
    Fault(what="reorder", call="Upload", rank=1, way="bf16"),
    Fault(what="truncate the stream", call="Upload", rank=1, way="bf16", seen="has a gap at byte"),
    Fault(what="forge", call="Upload", rank=1, way="bf16", seen="does not have the digest that it committed"),
    # The state goes instead.
    Fault(what="forge the base", call="Upload", rank=1, way="bf16"),
    Fault(what="kill the service", call="Upload", rank=1, way="bf16", seen="disconnected"),
    Fault(what="kill couriers", call="Upload", rank=1, way="bf16", victims=(1,), seen=DIED),
    Fault(what="corrupt", call="Fetch", rank=1, way="bf16"),
    Fault(what="corrupt", call="Fetch", rank=1, way="bf16", times=3, seen="fails its checksum"),
    Fault(what="duplicate", call="Fetch", rank=1, way="bf16", times=3, seen="came at"),
    Fault(what="truncate the stream", call="Fetch", rank=1, way="bf16", times=3, seen="did not come"),
    Fault(what="send NaN", call="Fetch", rank=1, way="bf16", seen="the prediction is not finite"),
]
ALTERED_MEMORY = [
    Fault(what="change the memory", call="Upload", rank=1, way="shared"),
    Fault(what="change the memory", call="Upload", rank=1, way="shared", times=3, seen="fails its checksum"),
    Fault(what="change the memory", call="Fetch", rank=1, way="shared"),
    Fault(what="change the memory", call="Fetch", rank=1, way="shared", times=3, seen="fails its checksum"),
    # The bytes go instead.
    Fault(what="lose the memory", call="Upload", rank=1, way="shared"),
    Fault(what="lose the memory", call="Fetch", rank=1, way="shared", seen="shares no buffer"),
]
# bf16 keeps a value to within 2 ** -9 of it. A change is at least that of ten steps: what one step changes is far more.
BF16_ERROR = 2.0**-8


def pass_through(run: FaultRun, fault: Fault, state_error: float = 0.0) -> Outcome:
    """Every fault fires as often as it is meant to, and the run comes through it unharmed."""
    outcome = run.pass_through(fault)
    assert outcome.num_fired == fault.times
    unharmed(run, outcome, state_error)
    return outcome


def assert_unnoticed_unless_seen(fault: Fault, outcome: Outcome) -> None:
    """Where sending again helps, neither a snapshot nor a nowcast is lost."""
    if fault.seen == "":
        reasons = [reason for passage in outcome.passages for reason in passage.reasons]
        words = ("checksum", "gap", "norm", "finite")
        assert [reason for reason in reasons if any(word in reason for word in words)] == []


@pytest.mark.parametrize("fault", killed_services(), ids=str)
def test_a_killed_service_costs_no_more_than_its_nowcasts(run: FaultRun, fault: Fault) -> None:
    pass_through(run, fault)


@pytest.mark.parametrize("fault", killed_couriers(), ids=str)
def test_a_killed_courier_is_replaced(run: FaultRun, fault: Fault) -> None:
    pass_through(run, fault)


@pytest.mark.parametrize("fault", [*ALTERED_UPLOADS, *ALTERED_FETCHES], ids=str)
def test_altered_chunks_never_become_weights(run: FaultRun, fault: Fault) -> None:
    outcome = pass_through(run, fault)
    assert_unnoticed_unless_seen(fault, outcome)


@pytest.mark.parametrize("fault", ALTERED_PREDICTIONS, ids=str)
def test_a_wrong_or_late_prediction_is_never_applied(run: FaultRun, fault: Fault) -> None:
    pass_through(run, fault)


@pytest.mark.parametrize("fault", FULL_DISKS, ids=str)
def test_a_full_disk_costs_what_was_to_be_written(run: FaultRun, fault: Fault) -> None:
    pass_through(run, fault)


@pytest.mark.parametrize("fault", [*REFUSED_MEMORY, *ALTERED_CHANGES, *ALTERED_MEMORY], ids=str)
def test_altered_changes_and_memory_never_become_weights(short_run: FaultRun, fault: Fault) -> None:
    outcome = pass_through(short_run, fault, BF16_ERROR)
    assert_unnoticed_unless_seen(fault, outcome)


def test_full_shared_memory_is_one_refusal_on_all_ranks_and_training_goes_on(run: FaultRun) -> None:
    refusals = run.attach_without_memory(1)
    assert refusals[0].startswith("no memory for the nowcaster's staging-0 buffer of")
    assert refusals == [refusals[0]] * 2
    # The courier that the other rank had started for it is gone.
    assert [run.num_couriers(rank) for rank in range(2)] == [1, 1]
    unharmed(run, run.pass_through(None))


def test_a_service_and_a_courier_that_stand_still_for_30_s_do_not_hold_up_training(run: FaultRun) -> None:
    fault = Fault(what="stop", call="Upload", rank=1, victims=(0,), seen="dropped")
    outcome = pass_through(run, fault)
    for passage in outcome.passages:
        # Far more than a step takes on any machine, far less than both stand still.
        assert passage.slowest_step_s < STOP_S / 3
