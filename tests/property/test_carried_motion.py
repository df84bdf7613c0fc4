"""What a session with pushes carries is the average of the run's own motion, whatever happens to run and service."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service import pushing
from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.dispatch import push_request
from sidecast.nowcaster_service.errors import SaturatedError
from sidecast.nowcaster_service.keeping.restoration import Restoration
from sidecast.nowcaster_service.keeping.run_folder import Recorder, RunFolder, folder_name, recorder_of
from sidecast.nowcaster_service.pushing import make_push
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import NowcastTask, Prediction, PushTask
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.policies import push
from sidecast.policies.push import PushConfig
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, buffer_digest, vector_digest
from sidecast.protos.shards import ShardSpec
from tests.support.services.dead import SECRET, examined, reopened

NUM_ELEMENTS = 6
PIECE_ELEMENTS = 2
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


class Death(Enum):
    """Where a service dies, with kill -9."""

    BEFORE_THE_RECORD = "a snapshot has been committed, and not recorded"
    BEFORE_THE_ENGINE = "no engine has begun"
    IN_THE_AVERAGE = "a third of the average has been written"
    BEFORE_THE_NOTE = "all of the average has been written, which nobody knows"
    IN_THE_PUSH = "the average is whole, the push is not"
    BEFORE_PUBLICATION = "the engine is done, which nobody knows"
    AT_REST = "nothing is under way"


# What happens in an interval: whether the published push is applied, and with which weight; what becomes of the state
# and of the push that is made from it; when the service dies, if it does, and whether the run begins anew after it.
WEIGHTS = st.one_of(st.none(), st.floats(0.125, 1.0, width=32))
SNAPSHOTS = st.sampled_from(["sent", "sent", "sent", "lost"])
ENGINES = st.sampled_from(["works", "works", "works", "fails"])
DEATHS = st.sampled_from([None, None, None, *Death])
ENDS = st.sampled_from(["goes on", "goes on", "goes on", "resumes"])
INTERVALS = st.lists(st.tuples(WEIGHTS, SNAPSHOTS, ENGINES, DEATHS, ENDS), min_size=1, max_size=14)


@dataclass
class Reference:
    """Knows every step of the optimizer, in double precision, and which intervals are left out.

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
        self.has_died = False
        self.num_restored = 0
        self.published: Prediction | None = None
        self.carry_before_P: np.ndarray | None = None
        self.store = HistoryStore(folder, 1 << 20)
        self.run_folder = RunFolder(self.store, self.store.new_folder(folder_name("run")))
        self.session = self.new_session()
        self.session.record()

    def new_session(self) -> Session:
        self.num_sessions += 1
        settings = replace(SETTINGS, session_id=f"s{self.num_sessions}")
        self.request = pb.OpenRequest(session_id=settings.session_id, run_id="run")
        return self.session_of(settings)

    def session_of(self, settings: SessionSettings) -> Session:
        recorder = recorder_of(self.run_folder, settings, self.request, Caller(secret=SECRET), ())
        session = Session(settings, self.run_folder, lambda event: None, recorder)
        shards = [ShardSpec(0, 0, NUM_ELEMENTS)]
        session.join(0, shards, shards)
        return session

    def resume(self) -> None:
        """The run goes on from a checkpoint of this very step, in another session."""
        later = self.new_session()
        later.adopt(self.session, self.step, self.epoch)
        later.record()
        self.session.close()
        self.session = later
        self.published = later.prediction
        if later.history_steps == []:
            self.reference = Reference()

    def restart(self) -> None:
        """The service has died, and another one goes on with what it has left."""
        self.num_restored += 1
        self.store = reopened(self.store)
        carry_P = self.reference.carry_P
        (folder,) = self.store.left
        self.run_folder = RunFolder(self.store, folder)
        found = examined(folder, "run")
        self.session = self.session_of(self.session.settings)
        restoration = Restoration(found, folder, self.store, self.session.settings)
        task = self.session.restore(restoration.state(is_alike=True))
        assert self.store.used_bytes <= SETTINGS.needed_bytes
        self.published = self.session.prediction
        if found.lost:
            self.reference.carry_P = carry_P if self.carry_before_P is None else self.carry_before_P
        if task is not None:
            self._make(task, works=True, death=None)

    def interval(
        self, weight: float | None, *, is_sent: bool = True, works: bool = True, death: Death | None = None
    ) -> None:
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
            self._send(works=works, death=death)
        if death is not None and not self.has_died:
            self.restart()
        self.has_died = False

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

    def _send(self, *, works: bool, death: Death | None) -> None:
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
        if death is Death.BEFORE_THE_RECORD and self.session.history_steps:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Recorder, "write", killed)
                with pytest.raises(KilledError):
                    self.session.commit(request)
            # As if the snapshot had never been sent.
            self.die()
            return
        task = self.session.commit(request)
        self.carry_before_P = self.reference.carry_P
        self.reference.snapshot()
        if task is not None:
            self._make(task, works=works, death=death)
        assert self.store.used_bytes <= SETTINGS.needed_bytes == 16 * NUM_ELEMENTS

    def die(self) -> None:
        self.has_died = True
        self.restart()

    def _make(self, task: NowcastTask, *, works: bool, death: Death | None) -> None:
        assert isinstance(task, PushTask)
        # Neither side holds more than the four vectors, not for a moment: there is no room for another snapshot now.
        assert self.store.used_bytes <= SETTINGS.needed_bytes
        with pytest.raises(SaturatedError):
            self.session.receive(ChunkFrame(pb.ChunkKey(rank=0, id=10_000 * INTERVAL_STEPS), 0, 0, memoryview(b"")))
        if task.begins:
            # What another vector has left in the file.
            np.frombuffer(task.delta.view, np.float32)[:] = np.nan
        if not works:
            self.session.finish(task, None, "the engine died")
            self.published = self.session.prediction
            self.reference.carry_P = np.zeros(NUM_ELEMENTS)
            return
        request = push_request(SETTINGS, task, self.session.note(task))
        if death is not None and death in KILLS:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(push, "_PIECE_ELEMENTS", PIECE_ELEMENTS)
                KILLS[death](patch)
                with pytest.raises(KilledError):
                    make_push(request)
        if death is not None and death is not Death.AT_REST:
            if death is Death.BEFORE_PUBLICATION:
                make_push(request)
            self.die()
            return
        made = make_push(request)
        assert not made.is_empty
        self._compare(task)
        prediction = Prediction(task, vector_digest(task.delta.view), 0.1, 0.1)
        self.session.finish(task, prediction, carry_digest=made.carry_digest)
        self.published = self.session.prediction
        assert self.published is prediction

    def _compare(self, task: PushTask) -> None:
        carry_P = np.fromfile(task.before.vector.path, np.float32)
        scale = max(1.0, float(np.abs(self.params_P).max())) / 1e-2
        np.testing.assert_allclose(carry_P, self.reference.carry_P, rtol=1e-5, atol=2.0**-24 * 8 * scale)


class KilledError(Exception):
    """Nothing of what follows happens."""


def killed(*_: Any, **__: Any) -> NoReturn:
    raise KilledError


def killed_in_the_average(patch: pytest.MonkeyPatch) -> None:
    fold, num_pieces = push.fold_, iter(range(NUM_ELEMENTS // PIECE_ELEMENTS))

    def fold_first(*args: Any) -> None:
        if next(num_pieces) == 1:
            raise KilledError
        fold(*args)

    patch.setattr(push, "fold_", fold_first)


KILLS: dict[Death, Callable[[pytest.MonkeyPatch], None]] = {
    Death.IN_THE_AVERAGE: killed_in_the_average,
    Death.BEFORE_THE_NOTE: lambda patch: patch.setattr(pushing, "write_sealed", killed),
    Death.IN_THE_PUSH: lambda patch: patch.setattr(pushing.torch, "mul", killed_half_way),
}


def killed_half_way(carry_P: torch.Tensor, factor: float, out: torch.Tensor) -> NoReturn:
    out[: NUM_ELEMENTS // 2] = carry_P[: NUM_ELEMENTS // 2] * factor
    raise KilledError


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(intervals=INTERVALS, seed=st.integers(0, 2**16))
def test_the_carry_is_the_average_of_the_optimizers_own_steps(
    folder: Path, intervals: list[tuple[float | None, str, str, Death | None, str]], seed: int
) -> None:
    run = Run(Path(tempfile.mkdtemp(dir=folder)), seed)
    for weight, snapshot, engine, death, end in intervals:
        run.interval(weight, is_sent=snapshot == "sent", works=engine == "works", death=death)
        if end == "resumes":
            run.resume()
    run.store.close()


LEFT_OUT = (Death.IN_THE_AVERAGE, Death.BEFORE_THE_NOTE)


def after_intervals(folder: Path, num: int, death: Death | None, *, is_lost: bool = False) -> tuple[Run, bytes]:
    """A run whose last interval but two ends with a death, or without its snapshot; and its average."""
    run = Run(Path(tempfile.mkdtemp(dir=folder)), 7)
    for index in range(num):
        is_it = index == num - 3
        # Nothing is applied: the weights go the same way whatever is published.
        run.interval(None, is_sent=not (is_it and is_lost), death=death if is_it else None)
    carry = run.session._motion.carry if run.session._motion is not None else None
    assert carry is not None
    run.store.close()
    return run, bytes(carry.vector.view)


@pytest.mark.parametrize("death", [death for death in Death if death not in LEFT_OUT])
def test_a_run_goes_on_bit_for_bit_after_the_death_of_its_service(folder: Path, death: Death) -> None:
    harmed, carry = after_intervals(folder, 6, death)
    # What was in flight is lost to both.
    unharmed, expected = after_intervals(folder, 6, None, is_lost=death is Death.BEFORE_THE_RECORD)
    assert carry == expected
    assert harmed.published is not None
    assert unharmed.published is not None
    assert harmed.published.digest == unharmed.published.digest


@pytest.mark.parametrize("death", LEFT_OUT)
def test_an_interval_that_is_half_averaged_leaves_the_average_as_it_was(folder: Path, death: Death) -> None:
    run = Run(Path(tempfile.mkdtemp(dir=folder)), 7)
    for _ in range(3):
        run.interval(None)
    before = run.session._motion.carry
    assert before is not None
    expected = bytes(before.vector.view)
    num_restored = run.num_restored
    run.interval(None, death=death)
    assert run.num_restored == num_restored + 1
    after = run.session._motion.carry
    assert after is not None
    assert bytes(after.vector.view) == expected
    assert run.session.history_steps == [4 * INTERVAL_STEPS]
    run.store.close()


def test_what_was_applied_and_is_not_known_is_left_out(folder: Path) -> None:
    run = Run(Path(tempfile.mkdtemp(dir=folder)), 0)
    run.interval(None)
    run.interval(None)
    # Something else was applied besides, of which the service knows nothing.
    run.epoch += 2
    run.reference.is_known = False
    num_failed = run.session.counts.failed
    run.interval(None)
    assert run.session.counts.failed == num_failed + 1
    # The next interval is averaged as if that one had not been.
    run.interval(1.0)
    run.store.close()


def test_a_state_that_is_not_finite_is_refused(folder: Path) -> None:
    run = Run(Path(tempfile.mkdtemp(dir=folder)), 0)
    run.interval(None)
    run.params_P[0] = np.nan
    with pytest.raises(ConfigError, match="not finite"):
        run.interval(None)
    run.store.close()
