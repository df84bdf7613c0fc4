"""What a session with pushes carries is the average of the run's own motion, whatever happens to run and service."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.dispatch import push_request
from sidecast.nowcaster_service.errors import SaturatedError
from sidecast.nowcaster_service.pushing import make_push
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import NowcastTask, Prediction, PushTask
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.policies.push import PushConfig
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, buffer_digest
from sidecast.protos.shards import ShardSpec

NUM_ELEMENTS = 6
INTERVAL_STEPS = 4
MANIFEST = ModelManifest.from_shapes([("w", (NUM_ELEMENTS,))], {"model_type": "toy"})
PUSH = PushConfig(interval_steps=INTERVAL_STEPS, time_constant_steps=9.0, start_step=0, max_relative_norm=None)
SETTINGS = SessionSettings(
    session_id="first",
    run_id="run",
    world_size=1,
    manifest=MANIFEST,
    context_len=2,
    snapshot_interval_steps=INTERVAL_STEPS,
    period_steps=INTERVAL_STEPS,
    horizons=(1,),
    predictor="push",
    predictor_options={},
    max_relative_norm=math.inf,
    push=PUSH,
)
# What happens in an interval: whether the published push is applied, and with which weight; what becomes of the state
# and of the push that is made from it; and whether the run, or the service, begins anew after it.
WEIGHTS = st.one_of(st.none(), st.floats(0.125, 1.0, width=32))
SNAPSHOTS = st.sampled_from(["sent", "sent", "sent", "lost"])
ENGINES = st.sampled_from(["works", "works", "works", "fails"])
ENDS = st.sampled_from(["goes on", "goes on", "goes on", "resumes", "service restarts"])
INTERVALS = st.lists(st.tuples(WEIGHTS, SNAPSHOTS, ENGINES, ENDS), min_size=1, max_size=14)


@dataclass
class Reference:
    """Knows every step of the optimizer, in double precision, and when the service's memory was lost.

    Attributes:
        carry_P: The average.
        own_P: Of the optimizer's steps since the last snapshot that the service has.
        learning_rates: Of those steps.
        num_steps: How many they are.
        is_begun: Whether the service has a snapshot.
        is_known: Whether the service can know what was applied since.
    """

    carry_P: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ELEMENTS))
    own_P: np.ndarray = field(default_factory=lambda: np.zeros(NUM_ELEMENTS))
    learning_rates: float = 0.0
    num_steps: int = 0
    is_begun: bool = False
    is_known: bool = True

    def snapshot(self) -> None:
        if self.is_begun and self.is_known:
            momentum = math.exp(-self.num_steps / PUSH.time_constant_steps)
            self.carry_P = momentum * self.carry_P + (1 - momentum) / self.learning_rates * self.own_P
        self.begin()
        self.is_begun = self.is_known = True

    def begin(self) -> None:
        self.own_P, self.learning_rates, self.num_steps = np.zeros(NUM_ELEMENTS), 0.0, 0


class Run:
    """A training run of one rank and the service's session of it, with the engine in between."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = np.random.default_rng(seed)
        self.params_P = self.random.standard_normal(NUM_ELEMENTS).astype(np.float32)
        self.reference = Reference()
        self.step = self.epoch = 0
        self.learning_rate_sum = 0.0
        self.applied = (0, 0.0)
        self.num_sessions = 0
        self.open_anew()

    def open_anew(self) -> None:
        """The service has died: another one knows nothing."""
        self.num_sessions += 1
        self.store = HistoryStore(self.folder / f"{self.num_sessions}", 1 << 20)
        self.session = self.new_session()
        self.published: Prediction | None = None
        self.reference = Reference()

    def new_session(self) -> Session:
        session_settings = replace(SETTINGS, session_id=f"{self.num_sessions}-{self.step}")
        session = Session(session_settings, self.store, lambda event: None)
        shards = [ShardSpec(0, 0, NUM_ELEMENTS)]
        session.join(0, shards, shards)
        return session

    def resume(self) -> None:
        """The run goes on from a checkpoint of this very step, in another session."""
        later = self.new_session()
        later.adopt(self.session, self.step, self.epoch)
        self.session.close()
        self.session = later
        self.published = later.prediction
        if later.history_steps == []:
            self.reference = Reference()

    def interval(self, weight: float | None, *, is_sent: bool, works: bool) -> None:
        for index in range(INTERVAL_STEPS):
            change_P = (0.1 * self.random.standard_normal(NUM_ELEMENTS)).astype(np.float32)
            learning_rate = float(self.random.uniform(1e-3, 1e-2))
            before_P = self.params_P.copy()
            self.params_P = self.params_P + change_P
            self.reference.own_P += self.params_P.astype(np.float64) - before_P
            self.reference.learning_rates += learning_rate
            self.reference.num_steps += 1
            self.learning_rate_sum += learning_rate
            self.step += 1
            if index == 1 and weight is not None and self.published is not None:
                self._apply(self.published, weight)
        if is_sent:
            self._send(works=works)

    def _apply(self, published: Prediction, weight: float) -> None:
        # What ranks refuse: a push from before another one, or of the interval before.
        if published.task.epoch != self.epoch or self.step - published.task.base_step >= INTERVAL_STEPS:
            return
        delta_P = np.frombuffer(published.task.delta.view, np.float32)
        self.params_P = self.params_P + delta_P * np.float32(weight)
        self.applied = (published.task.version, weight)
        self.epoch += 1
        self.session.settle(published.task.version)
        self.session.begin_epoch(self.epoch)

    def _send(self, *, works: bool) -> None:
        data = memoryview(self.params_P.tobytes())
        key = pb.ChunkKey(session_id="s", rank=0, id=self.step, epoch=self.epoch)
        self.session.receive(ChunkFrame(key, 0, crc32(data), data))
        request = pb.CommitRequest(
            rank=0,
            step=self.step,
            epoch=self.epoch,
            num_bytes=len(data),
            digest=buffer_digest([(0, len(data), crc32(data))]),
            learning_rate_sum=self.learning_rate_sum,
            applied_version=self.applied[0],
            applied_weight=self.applied[1],
        )
        task = self.session.commit(request)
        self.reference.snapshot()
        if task is not None:
            self._make(task, works=works)
        assert self.store.used_bytes <= SETTINGS.needed_bytes == 16 * NUM_ELEMENTS

    def _make(self, task: NowcastTask, *, works: bool) -> None:
        assert isinstance(task, PushTask)
        # Neither side holds more than the four vectors, not for a moment: there is no room for another snapshot now.
        assert self.store.used_bytes <= SETTINGS.needed_bytes
        with pytest.raises(SaturatedError):
            self.session.receive(ChunkFrame(pb.ChunkKey(rank=0, id=10_000 * INTERVAL_STEPS), 0, 0, memoryview(b"")))
        if task.begins:
            # What another vector has left in the file.
            np.frombuffer(task.carry.view, np.float32)[:] = np.nan
        if not works:
            self.session.finish(task, None, "the engine died")
            self.published = self.session.prediction
            self.reference.carry_P = np.zeros(NUM_ELEMENTS)
            return
        assert make_push(push_request(SETTINGS, task))
        self._compare(task)
        prediction = Prediction(task, 1, 0.1, 0.1)
        self.session.finish(task, prediction)
        self.published = self.session.prediction
        assert self.published is prediction

    def _compare(self, task: PushTask) -> None:
        carry_P = np.fromfile(task.carry.path, np.float32)
        scale = max(1.0, float(np.abs(self.params_P).max())) / 1e-2
        np.testing.assert_allclose(carry_P, self.reference.carry_P, rtol=1e-5, atol=2.0**-24 * 8 * scale)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(deadline=None, max_examples=60)
@given(intervals=INTERVALS, seed=st.integers(0, 2**16))
def test_the_carry_is_the_average_of_the_optimizers_own_steps(
    folder: Path, intervals: list[tuple[float | None, str, str, str]], seed: int
) -> None:
    run = Run(Path(tempfile.mkdtemp(dir=folder)), seed)
    for weight, snapshot, engine, end in intervals:
        run.interval(weight, is_sent=snapshot == "sent", works=engine == "works")
        if end == "resumes":
            run.resume()
        elif end == "service restarts":
            run.open_anew()
    run.store.close()


def test_what_was_applied_and_is_not_known_is_left_out(folder: Path) -> None:
    run = Run(Path(tempfile.mkdtemp(dir=folder)), 0)
    run.interval(None, is_sent=True, works=True)
    run.interval(None, is_sent=True, works=True)
    # Something else was applied besides, of which the service knows nothing.
    run.epoch += 2
    run.reference.is_known = False
    num_failed = run.session.counts.failed
    run.interval(None, is_sent=True, works=True)
    assert run.session.counts.failed == num_failed + 1
    # The next interval is averaged as if that one had not been.
    run.interval(1.0, is_sent=True, works=True)
    run.store.close()


def test_a_state_that_is_not_finite_is_refused(folder: Path) -> None:
    run = Run(Path(tempfile.mkdtemp(dir=folder)), 0)
    run.interval(None, is_sent=True, works=True)
    run.params_P[0] = np.nan
    with pytest.raises(ConfigError, match="not finite"):
        run.interval(None, is_sent=True, works=True)
    run.store.close()
