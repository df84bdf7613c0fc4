"""A session's read-outs are the averages that their definition gives, whatever happens to run and service."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.dispatch import fold_request, push_request
from sidecast.nowcaster_service.errors import SaturatedError
from sidecast.nowcaster_service.keeping.restoration import Restoration
from sidecast.nowcaster_service.keeping.run_folder import RunFolder, folder_name, recorder_of
from sidecast.nowcaster_service.pushing import make_push
from sidecast.nowcaster_service.read_outs.averages import FoldTask
from sidecast.nowcaster_service.read_outs.folding import FoldAnswer, answer_fold
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import NowcastTask, Prediction, PushTask
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.policies.push import PushConfig
from sidecast.policies.read_outs import read_outs_of
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import vector_digest
from sidecast.protos.shards import ShardSpec
from tests.support.services.dead import SECRET, examined, push_settings, reopened, send_state

NUM_ELEMENTS = 6
INTERVAL_STEPS = 4
MANIFEST = ModelManifest.from_shapes([("w", (NUM_ELEMENTS,))], {"model_type": "toy"})
READ_OUTS = read_outs_of(["ema20", "mean@6", "wsm@0"])
PUSH = PushConfig(interval_steps=INTERVAL_STEPS, start_step=0, gain=1.0)
PUSHED = replace(push_settings(MANIFEST, PUSH), read_outs=READ_OUTS)
SETTINGS: dict[str, SessionSettings] = {
    # No nowcast is ever due.
    "jumps": replace(PUSHED, push=None, period_steps=10**6 * INTERVAL_STEPS),
    "pushes": PUSHED,
    "read-outs alone": replace(PUSHED, push=replace(PUSH, gain=0.0)),
}


class Death(Enum):
    """Where a service dies, with kill -9: which read-out it is at, and how far it has come."""

    BEFORE_THE_FIRST = (0, "nothing")
    IN_THE_FIRST = (0, "half")
    AFTER_THE_FIRST = (0, "all, which nobody knows")
    IN_THE_LAST = (2, "half")


EVENTS = st.tuples(
    st.sampled_from(["sent", "sent", "sent", "lost"]),
    # Which read-out's engine fails.
    st.sampled_from([None, None, None, 0, 1]),
    st.sampled_from([None, None, None, *Death]),
    st.sampled_from(["goes on", "goes on", "goes on", "dies", "resumes", "goes back"]),
    st.booleans(),
)


@dataclass
class Seen:
    """What a read-out has been shown.

    Attributes:
        begin_step: Where its first state's steps begin.
        states: By step.
    """

    begin_step: int = 0
    states: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def step(self) -> int:
        return max(self.states, default=-1)

    def average(self, power: float, start_step: int) -> np.ndarray:
        """By the definition: of the weight, ``((x - start) / (s - start)) ** power`` lies on the steps up to x."""
        steps = sorted(self.states)
        edges = np.maximum(0, np.array([self.begin_step, *steps], np.float64) - start_step)
        masses = np.diff((edges / edges[-1]) ** power)
        return (
            np.asarray(sum(mass * self.states[step] for mass, step in zip(masses, steps, strict=True))) / masses.sum()
        )


class Run:
    """A run of one rank and the service's session of it, with the engine in between."""

    def __init__(self, folder: Path, kind: str, seed: int) -> None:
        self.settings = SETTINGS[kind]
        self.random = np.random.default_rng(seed)
        self.step = self.num_sessions = self.num_restored = 0
        self.state_P = self.random.standard_normal(NUM_ELEMENTS)
        self.states: dict[int, np.ndarray] = {}
        self.seen = [Seen() for _ in READ_OUTS]
        self.store = HistoryStore(folder, 1 << 20)
        self.run_folder = RunFolder(self.store, self.store.new_folder(folder_name("run")))
        self.session = self.new_session()
        self.session.record()

    def new_session(self) -> Session:
        self.num_sessions += 1
        settings = replace(self.settings, session_id=f"s{self.num_sessions}")
        request = pb.OpenRequest(session_id=settings.session_id, run_id="run")
        recorder = recorder_of(self.run_folder, settings, request, Caller(secret=SECRET), ())
        session = Session(settings, self.run_folder, lambda event: None, recorder)
        shards = [ShardSpec(0, 0, NUM_ELEMENTS)]
        session.join(0, shards, shards)
        return session

    def interval(self, is_sent: bool, failing: int | None, death: Death | None, pushes_first: bool) -> None:
        self.step += INTERVAL_STEPS
        self.state_P = self.state_P + 0.1 * self.random.standard_normal(NUM_ELEMENTS)
        if not is_sent:
            return
        self.states[self.step] = self.state_P.astype(np.float32).astype(np.float64)
        task = send_state(self.session, self.step, self.state_P)
        assert self.store.used_bytes <= self.settings.needed_bytes
        if pushes_first:
            self.push(task)
        if self.session.read_outs.claim():
            if self.settings.push is not None:
                # What is averaged is not to be written to: not even received, over which it would be.
                with pytest.raises(SaturatedError, match="still being made"):
                    send_state(self.session, self.step + INTERVAL_STEPS, self.state_P)
            if not self.fold(failing, death):
                self.restart()
                return
        if not pushes_first:
            self.push(task)

    def push(self, task: NowcastTask | None) -> None:
        if not isinstance(task, PushTask):
            return
        made = make_push(push_request(self.settings, task, self.session.note(task)))
        prediction = None if made.is_empty else Prediction(task, vector_digest(task.delta.view), 0.1, 0.1)
        self.session.finish(task, prediction, carry_digest=made.carry_digest)

    def fold(self, failing: int | None = None, death: Death | None = None) -> bool:
        """Averages into one read-out after another; returns whether the service is still alive."""
        while (task := self.session.read_outs.next()) is not None:
            index = READ_OUTS.index(task.read_out)
            # What another vector has left in the file.
            np.frombuffer(task.out.view, np.float32)[:] = np.nan
            if death is not None and death.value[0] == index:
                self.half_done(task, death.value[1])
                return False
            answer = answer_fold(fold_request(self.settings, task)) if index != failing else FoldAnswer(refusal="died")
            assert self.store.used_bytes <= self.settings.needed_bytes
            self.session.finish_fold(task, answer)
            if not answer.refusal:
                self.show(index, task.snapshot.step)
        return True

    def half_done(self, task: FoldTask, how_far: str) -> None:
        if how_far == "half":
            np.frombuffer(task.out.view, np.float32)[: NUM_ELEMENTS // 2] = 7.0
        elif how_far != "nothing":
            answer_fold(fold_request(self.settings, task))

    def show(self, index: int, step: int) -> None:
        seen = self.seen[index]
        if not seen.states:
            seen.begin_step = step - INTERVAL_STEPS
        seen.states[step] = self.states[step]

    def restart(self) -> None:
        """The service has died, and another one goes on with what it has left."""
        self.num_restored += 1
        self.store = reopened(self.store)
        (folder,) = self.store.left
        self.run_folder = RunFolder(self.store, folder)
        found = examined(folder, "run")
        self.num_sessions -= 1
        self.session = self.new_session()
        task = self.session.restore(Restoration(found, folder, self.store, self.settings).state(is_alike=True))
        assert self.store.used_bytes <= self.settings.needed_bytes
        self.push(task)
        self.goes_on()

    def resume(self, step: int) -> None:
        """The run goes on from a checkpoint in another session."""
        earlier, self.session = self.session, self.new_session()
        self.step = step
        for index, seen in enumerate(self.seen):
            if seen.step > step:
                self.seen[index] = Seen()
        self.session.adopt(earlier, step, 0)
        self.session.record()
        earlier.close()
        self.goes_on()

    def goes_on(self) -> None:
        """What the newest state that was taken over is not in, it goes into now."""
        if self.session.read_outs.claim():
            assert self.fold()
        if self.session.history_steps:
            newest = self.session.history_steps[-1]
            for read_out, seen in zip(READ_OUTS, self.seen, strict=True):
                assert seen.step >= newest or newest <= read_out.start_step

    def check(self) -> None:
        for read_out, seen in zip(READ_OUTS, self.seen, strict=True):
            average = self.session.read_outs.averages.get(read_out.name)
            assert (average is None) == (not seen.states)
            if average is not None:
                assert (average.step, average.begin_step) == (seen.step, seen.begin_step)
                assert average.num_snapshots == len(seen.states)
                expected_P = seen.average(read_out.power, read_out.start_step)
                found_P = np.frombuffer(average.vector.view, np.float32)
                np.testing.assert_allclose(found_P, expected_P, rtol=1e-5, atol=2.0**-20)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(derandomize=True, deadline=None, max_examples=40, database=None)
@given(
    kind=st.sampled_from(sorted(SETTINGS)),
    events=st.lists(EVENTS, min_size=1, max_size=14),
    seed=st.integers(0, 2**16),
)
def test_read_outs_are_what_their_definition_gives(
    folder: Path, kind: str, events: list[tuple[str, int | None, Death | None, str, bool]], seed: int
) -> None:
    run = Run(Path(tempfile.mkdtemp(dir=folder)), kind, seed)
    for snapshot, failing, death, end, pushes_first in events:
        run.interval(snapshot == "sent", failing, death, pushes_first)
        run.check()
        if end == "dies":
            run.restart()
        elif end == "resumes":
            run.resume(run.step)
        elif end == "goes back":
            run.resume(max(0, run.step - INTERVAL_STEPS - 1))
            run.step = run.step // INTERVAL_STEPS * INTERVAL_STEPS
        run.check()
    run.session.close()
    assert run.store.used_bytes == 0
    run.store.close()


def test_a_fold_that_ends_after_its_session_changes_nothing(folder: Path) -> None:
    """A run resumes while an engine is at work: the state goes into the averages of the new session, once."""
    run = Run(Path(tempfile.mkdtemp(dir=folder)), "jumps", 1)
    run.interval(True, None, None, False)
    run.step += INTERVAL_STEPS
    run.states[run.step] = run.state_P.astype(np.float32).astype(np.float64)
    send_state(run.session, run.step, run.state_P)
    earlier = run.session
    assert earlier.read_outs.claim()
    task = earlier.read_outs.next()
    assert task is not None
    answer = answer_fold(fold_request(run.settings, task))
    run.resume(run.step)
    earlier.finish_fold(task, answer)
    assert earlier.read_outs.next() is None
    run.check()
    run.session.close()
    assert run.store.used_bytes == 0


def test_needed_bytes_count_them() -> None:
    vectors = {kind: settings.needed_bytes // settings.num_vector_bytes for kind, settings in SETTINGS.items()}
    without = {kind: replace(item, read_outs=()).needed_bytes for kind, item in SETTINGS.items()}
    extra = {kind: count - without[kind] // PUSHED.num_vector_bytes for kind, count in vectors.items()}
    assert vectors == {"jumps": 13, "pushes": 9, "read-outs alone": 7}
    assert extra == {"jumps": 6, "pushes": 5, "read-outs alone": 5}
