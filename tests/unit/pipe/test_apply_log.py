"""The apply log: what survives restarts and resumes, and what replaying it does."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.hook.replay import Replayer
from sidecast.trainer.partitions import RollbackCopy
from sidecast.trainer.pipe.apply_log import Recorder, log_path, read_delta, read_log
from sidecast.trainer.pipe.messages import Session

DELTA = memoryview(torch.tensor([1.0, 2.0]).numpy().tobytes())


def session(name: str, resume_step: int = 0) -> Session:
    return Session(
        session_id=name,
        run_id="run",
        resumed=resume_step > 0,
        resume_step=resume_step,
        resume_epoch=0,
        run_secret="secret",
    )


def applied(step: int, weight: float = 1.0) -> dict[str, Any]:
    return {"action": "applied", "step": step, "weight": weight, "merge": "age_weighted", "moments": "keep"}


def steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_log(folder, 0)]


class FakePartition:
    """Two weights."""

    owned_shards = (ShardSpec(0, 0, 2),)

    def __init__(self) -> None:
        self.weights = torch.zeros(2)
        self.factors: list[float] = []

    def read_owned(self, out: torch.Tensor) -> None:
        out.copy_(self.weights)

    def apply(self, delta: torch.Tensor, weight: float, *, base: torch.Tensor | None = None) -> None:
        self.weights = (self.weights if base is None else base) + weight * delta

    def scale_momentum(self, factor: float) -> None:
        self.factors.append(factor)

    def rollback_bytes(self) -> int:
        return 64

    def capture(self, copy: RollbackCopy) -> None:
        copy.save({"weights": self.weights}, {})

    def restore(self, copy: RollbackCopy) -> None:
        self.weights.copy_(copy.tensors()["weights"])


def test_an_entry_told_twice_is_written_once(tmp_path: Path) -> None:
    for _ in range(2):
        Recorder(tmp_path, 0).record(applied(10), DELTA, session("s"))
    assert steps(tmp_path) == [10]


def test_half_a_line_of_a_killed_courier_is_dropped(tmp_path: Path) -> None:
    Recorder(tmp_path, 0).record(applied(10), DELTA, session("s"))
    with log_path(tmp_path, 0).open("a") as stream:
        stream.write('{"action": "app')
    Recorder(tmp_path, 0).record(applied(20), DELTA, session("s"))
    assert steps(tmp_path) == [10, 20]


def test_a_resume_takes_back_the_future_that_it_gives_up(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    for step in (10, 20, 30):
        recorder.record(applied(step), DELTA, session("before"))
    recorder.record(applied(25), DELTA, session("after", resume_step=15))
    recorder.record(applied(35), DELTA, session("after", resume_step=15))
    assert steps(tmp_path) == [10, 25, 35]
    recorder.record(applied(5), DELTA, session("another run"))
    assert steps(tmp_path) == [5]


def test_a_resume_without_jumps_takes_its_future_back_before_the_next_resume(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    for step in (10, 20, 30):
        recorder.record(applied(step), DELTA, session("first"))
    recorder.resume(session("second", resume_step=15))
    recorder.record(applied(45), DELTA, session("third", resume_step=40))
    assert steps(tmp_path) == [10, 45]


def test_a_run_without_jumps_can_be_replayed(tmp_path: Path) -> None:
    Recorder(tmp_path, 0)
    replayer = Replayer(tmp_path, FakePartition(), rank=0, step=0)  # type: ignore[arg-type]
    replayer.after_step(1)
    assert replayer.summary() == {"num_applied": 0, "num_rolled_back": 0}


def test_replays_jumps_and_rollbacks_at_their_steps(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    recorder.record(applied(2, 0.5), DELTA, session("s"))
    recorder.record(applied(4), DELTA, session("s"))
    recorder.record({"action": "rolled_back", "step": 5}, None, session("s"))
    partition = FakePartition()
    replayer = Replayer(tmp_path, partition, rank=0, step=0)  # type: ignore[arg-type]
    seen = []
    for step in range(1, 7):
        replayer.after_step(step)
        replayer.after_step(step)
        seen.append(partition.weights.tolist())
    assert seen == [[0, 0], [0.5, 1], [0.5, 1], [1.5, 3], [0.5, 1], [0.5, 1]]


def test_a_replay_goes_on_from_a_checkpoint_but_cannot_undo_what_it_did_not_do(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 0)
    recorder.record(applied(2), DELTA, session("s"))
    recorder.record({"action": "rolled_back", "step": 5}, None, session("s"))
    partition = FakePartition()
    replayer = Replayer(tmp_path, partition, rank=0, step=0)  # type: ignore[arg-type]
    replayer.after_step(2)
    replayer.resume(None, 3, "run")
    with pytest.raises(ConfigError, match="the log undoes a jump at step 5"):
        replayer.after_step(5)


@pytest.mark.parametrize("damage", ["missing", "short", "changed"])
def test_a_delta_that_is_not_the_recorded_one_is_refused(tmp_path: Path, damage: str) -> None:
    Recorder(tmp_path, 0).record(applied(2), DELTA, session("s"))
    (entry,) = read_log(tmp_path, 0)
    path = tmp_path / entry["file"]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\0" * (4 if damage == "short" else 8))
    with pytest.raises(ConfigError, match=entry["file"]):
        read_delta(tmp_path, entry, 8)


def test_a_folder_without_this_ranks_log_or_with_a_damaged_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no applied-rank1\.jsonl"):
        read_log(tmp_path, 1)
    log_path(tmp_path, 1).write_text("{")
    with pytest.raises(ConfigError, match=r"applied-rank1\.jsonl is damaged"):
        read_log(tmp_path, 1)


def test_a_jump_that_replaced_its_base_replaces_it_in_the_replay(tmp_path: Path) -> None:
    entry = {**applied(12, weight=0.5), "merge": "replace", "moments": "scale", "base_step": 10}
    Recorder(tmp_path, 0).record(entry, DELTA, session("s"))
    partition = FakePartition()
    replayer = Replayer(tmp_path, partition, rank=0, step=0)  # type: ignore[arg-type]
    for step in range(1, 13):
        partition.weights = partition.weights + 1.0
        replayer.after_step(step)
    assert partition.weights.tolist() == [10.5, 11.0]
    assert partition.factors == [0.5]


def test_a_replay_that_begins_after_the_base_says_so(tmp_path: Path) -> None:
    entry = {**applied(12), "merge": "replace", "base_step": 10}
    Recorder(tmp_path, 0).record(entry, DELTA, session("s"))
    replayer = Replayer(tmp_path, FakePartition(), rank=0, step=11)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="replaces weights of step 10, which lies before the step to resume from"):
        replayer.after_step(12)


@pytest.mark.parametrize("lacks_room_for", ["delta-*", "*"], ids=["the delta", "everything"])
def test_what_found_no_room_on_the_disk_is_missed_when_the_run_is_to_be_replayed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacks_room_for: str
) -> None:
    write_bytes = Path.write_bytes

    def write_on_a_full_disk(path: Path, data: bytes) -> int:
        if not path.match(lacks_room_for):
            return write_bytes(path, data)
        write_bytes(path, data[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    recorder = Recorder(tmp_path, 0)
    recorder.record(applied(10), DELTA, session("a"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", write_on_a_full_disk)
        with pytest.raises(OSError, match="No space left"):
            recorder.record(applied(20), DELTA, session("a"))
    assert [path.name for path in tmp_path.glob("delta-*")] == ["delta-step00000010-rank0.f32"]
    recorder.record(applied(30), DELTA, session("a"))
    with pytest.raises(ConfigError, match=r"applied-rank0\.jsonl lacks what was done at step 20"):
        read_log(tmp_path, 0)
    # A resume from before that step has given it up.
    recorder.resume(session("b", resume_step=10))
    assert steps(tmp_path) == [10]
