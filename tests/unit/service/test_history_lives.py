"""Files of one service are nothing to the next one, and to no other that runs beside it."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.nowcasting import LocalRunner, Nowcasting, NowcastRequest, PredictorRequest
from sidecast.nowcaster_service.vector_files import HistoryFiles
from sidecast.nowcaster_service.vector_store import HistoryStore, VectorFile
from sidecast.predictors.base import Predictor
from tests.support.limits import HANG_S

MANIFEST = ModelManifest.from_shapes([("w", (1000,))], {"model_type": "toy"})
BUDGET_BYTES = 1 << 20


def filled(store: HistoryStore, seed: int) -> VectorFile:
    vector = store.create(MANIFEST.num_elements)
    vector.view[:] = np.random.default_rng(seed).standard_normal(MANIFEST.num_elements).astype(np.float32).tobytes()
    return vector


def test_a_folder_belongs_to_one_store_at_a_time(tmp_path: Path) -> None:
    first = HistoryStore(tmp_path / "history", BUDGET_BYTES)
    kept = filled(first, 1)
    before = bytes(kept.view)
    with pytest.raises(ConfigError, match=r"--history-dir .*history is in use by another running service"):
        HistoryStore(tmp_path / "history", BUDGET_BYTES)
    assert kept.path.read_bytes() == before
    first.close()
    second = HistoryStore(tmp_path / "history", BUDGET_BYTES)
    assert not kept.path.exists()
    assert filled(second, 2).path != kept.path


def test_a_store_waits_for_one_that_is_just_ending(tmp_path: Path) -> None:
    first = HistoryStore(tmp_path, BUDGET_BYTES)
    ending = threading.Thread(target=first.close)
    ending.start()
    HistoryStore(tmp_path, BUDGET_BYTES, lock_timeout_s=30.0).close()
    ending.join()


def test_what_is_no_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--history-dir .*file cannot be used: (File exists|Not a directory)$"):
        HistoryStore(tmp_path / "file", BUDGET_BYTES)


def test_no_file_is_ever_emptied(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path, BUDGET_BYTES)
    path = store.folder / f"{store.folder.name}-000000000.f32"
    path.write_bytes(b"somebody's")
    with pytest.raises(FileExistsError):
        store.create(MANIFEST.num_elements)
    assert path.read_bytes() == b"somebody's"


class GatedRunner(LocalRunner):
    """Stops when the prediction is written, as an engine does that outlives its service."""

    def __init__(self) -> None:
        self.is_written, self.may_go_on = threading.Event(), threading.Event()

    def predict(self, predictor: Predictor, files: HistoryFiles, horizon_intervals: int, delta_path: Path) -> None:
        super().predict(predictor, files, horizon_intervals, delta_path)
        self.is_written.set()
        assert self.may_go_on.wait(HANG_S)


def request(states: list[VectorFile], delta: VectorFile) -> NowcastRequest:
    return NowcastRequest(
        predictor=PredictorRequest(
            predictor="linear", options={}, manifest_json=MANIFEST.to_json(), context_len=len(states)
        ),
        state_paths=tuple(state.path for state in states),
        delta_path=delta.path,
        horizon_intervals=1,
        max_relative_norm=100.0,
        rounds_to_bf16=True,
    )


def test_a_nowcast_that_outlives_its_service_reaches_no_file_of_the_next(tmp_path: Path) -> None:
    store = HistoryStore(tmp_path, BUDGET_BYTES)
    in_flight = request([filled(store, 1), filled(store, 2)], filled(store, 3))
    queued = request([filled(store, 4), filled(store, 5)], filled(store, 6))
    runner = GatedRunner()
    engine = Nowcasting(None, runner=runner)
    working = threading.Thread(target=engine.predict, args=(in_flight,))
    working.start()
    assert runner.is_written.wait(HANG_S)
    # Its service is gone, and so is its lock.
    os.close(store._lock._descriptor)
    following = HistoryStore(tmp_path, BUDGET_BYTES)
    states = [filled(following, seed) for seed in range(11, 18)]
    before = [bytes(state.view) for state in states]
    runner.may_go_on.set()
    working.join()
    answer = engine.predict(queued)
    assert answer.refusal.endswith("is gone: the service that wrote it has ended")
    assert [state.path.read_bytes() for state in states] == before


def test_what_is_checked_is_what_was_predicted(tmp_path: Path) -> None:
    """Whatever becomes of the names meanwhile."""
    store = HistoryStore(tmp_path, BUDGET_BYTES)
    states, delta = [filled(store, 1), filled(store, 2)], filled(store, 3)
    runner = GatedRunner()
    engine = Nowcasting(None, runner=runner)
    answers = []
    working = threading.Thread(target=lambda: answers.append(engine.predict(request(states, delta))))
    working.start()
    assert runner.is_written.wait(HANG_S)
    for vector in (*states, delta):
        vector.path.unlink()
        vector.path.write_bytes(bytes(vector.num_bytes))
    runner.may_go_on.set()
    working.join()
    newest = torch.frombuffer(states[-1].view, dtype=torch.float32)
    change: Tensor = torch.frombuffer(delta.view, dtype=torch.float32)
    assert answers[0].refusal == ""
    assert answers[0].relative_norm == pytest.approx(float(change.norm() / newest.norm()), rel=1e-5)
