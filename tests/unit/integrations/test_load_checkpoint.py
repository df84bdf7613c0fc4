"""Which run a loaded checkpoint continues, and what of it the user gets to see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.protos.shards import ShardSpec
from sidecast.protos.transport import MIN_RUN_SECRET_CHARACTERS
from sidecast.trainer.hook.attachment import Attachment, load_rollback_copy, rollback_path
from sidecast.trainer.hook.ranks import Ranks
from sidecast.trainer.hook.replay import Replayer
from sidecast.trainer.integrations.deepspeed import wrap
from sidecast.trainer.partitions import RollbackCopy, StalePartitionError
from sidecast.trainer.pipe.apply_log import Recorder
from sidecast.trainer.pipe.messages import Session
from tests.support.courier_harness import session


class AloneRanks(Ranks):
    """One rank of several, whose others say what a test has them say."""

    def __init__(self, *others: Any) -> None:
        super().__init__(None)
        self._others = list(others)

    def gather(self, value: Any) -> list[Any]:
        return [value, *(self._others.pop(0) if self._others else [])]


def attachment_at(step: int, resumed: list[Any], moved: str = "") -> Attachment:
    """A hook on a run whose checkpoint leaves it at a step, and perhaps with something else on this rank."""

    def map_anew() -> None:
        if moved:
            raise StalePartitionError(moved)

    run: Any = SimpleNamespace(applied_steps=lambda: step)
    partition: Any = SimpleNamespace(map_anew=map_anew)
    hook: Any = SimpleNamespace(
        is_on_probation=False,
        is_closed=False,
        resume=lambda state, *_, is_kept: resumed.append(is_kept and state is not None),
    )
    courier: Any = SimpleNamespace(new_session=lambda session: resumed.append(session.run_id))
    return Attachment(run, hook, partition, Ranks(None), courier)


@pytest.mark.parametrize(("loaded_step", "is_continued"), [(500, True), (0, False)])
def test_a_run_is_continued_only_at_the_step_of_its_checkpoint(
    loaded_step: int, is_continued: bool, tmp_path: Path
) -> None:
    saved = {"run_id": "pretraining", "step": 500, "epoch": 2}
    engine = SimpleNamespace(
        step=None,
        backward=None,
        save_checkpoint=None,
        load_checkpoint=lambda *_, **__: (str(tmp_path / "model.pt"), {"sidecast": saved, "theirs": 1}),
    )
    resumed: list[Any] = []
    wrap(engine, attachment_at(loaded_step, resumed))
    _, client_state = engine.load_checkpoint(str(tmp_path))
    continues, run_id = resumed
    assert (continues, run_id == "pretraining") == (is_continued, is_continued)
    assert client_state == {"theirs": 1}


def test_a_run_keeps_its_secret_over_resumes(tmp_path: Path) -> None:
    attachment = attachment_at(500, [])
    sessions: list[Session] = []

    def begin(session: Session) -> None:
        courier.session = session
        sessions.append(session)

    courier: Any = attachment._courier
    courier.new_session = begin
    attachment.resume(None, tmp_path)
    attachment.hook.state_dict = lambda: {"run_id": sessions[0].run_id, "step": 500, "epoch": 2}
    saved = attachment.state_dict()
    assert saved is not None
    attachment.resume(saved, tmp_path)
    # A checkpoint from before there were secrets.
    attachment.resume({name: value for name, value in saved.items() if name != "run_secret"}, tmp_path)
    first, resumed, unknown = (session.run_secret for session in sessions)
    assert first == resumed != unknown
    assert min(len(first), len(unknown)) >= MIN_RUN_SECRET_CHARACTERS
    assert first not in repr(sessions)


def test_a_checkpoint_that_changes_what_a_rank_holds_is_refused(tmp_path: Path) -> None:
    resumed: list[Any] = []
    with pytest.raises(ConfigError, match=r"this rank's partition \(other owned_shards\); attach after loading"):
        attachment_at(500, resumed, moved="other owned_shards").resume(None, tmp_path)
    assert resumed == []


def test_a_checkpoint_without_a_jump_on_probation_keeps_no_older_rollback_copy(tmp_path: Path) -> None:
    attachment: Any = attachment_at(500, [])
    copies = [{"buffer": torch.ones(2, dtype=torch.uint8)}, None, None]
    attachment.hook.rollback_state = lambda: copies.pop(0)
    others = rollback_path(tmp_path, 1)
    others.touch()
    attachment.save_rollback_copy(tmp_path)
    assert torch.load(rollback_path(tmp_path, 0), weights_only=True)["buffer"].tolist() == [1, 1]
    for _ in range(2):
        attachment.save_rollback_copy(tmp_path)
        # Other ranks' copies are theirs to remove.
        assert list(tmp_path.iterdir()) == [others]


def test_a_replay_resumes_by_the_step_of_the_checkpoint_whoever_saved_it(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "log", 0)
    for step in (2, 5):
        entry = {"action": "applied", "step": step, "weight": 1.0, "merge": "age_weighted", "moments": "keep"}
        recorder.record(entry, memoryview(b"\0" * 8), session("s"))
    steps = [0]
    run: Any = SimpleNamespace(applied_steps=lambda: steps[-1])
    jumps: list[int] = []
    partition: Any = SimpleNamespace(
        owned_shards=(ShardSpec(0, 0, 2),), map_anew=lambda: None, apply=lambda *_, **__: jumps.append(steps[-1])
    )
    replayer = Replayer(tmp_path / "log", partition, rank=0, step=0)
    attachment = Attachment(run, replayer, partition, Ranks(None))
    attachment.save_rollback_copy(tmp_path)
    assert (attachment.state_dict(), attachment.rollback_state()) == (None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]
    for resumed_at in (4, 1):
        steps.append(resumed_at)
        attachment.resume({"run_id": "live", "step": resumed_at, "epoch": 1}, tmp_path)
        for step in range(resumed_at + 1, 7):
            steps.append(step)
            attachment.after_step()
    assert jumps == [5, 2, 5]
    assert replayer.summary()["num_applied"] == 3


def test_a_full_disk_costs_the_rollback_copy_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attachment: Any = attachment_at(500, [])
    attachment.hook.rollback_state = lambda: {"buffer": torch.ones(1 << 20, dtype=torch.uint8)}
    path = rollback_path(tmp_path, 0)
    path.write_text("of an earlier jump")
    path.with_name(f"{path.name}.partial").symlink_to("/dev/full")
    attachment.save_rollback_copy(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert caplog.text.count("cannot undo the jump on probation") == 1
    attachment.save_rollback_copy(tmp_path / "nowhere")
    assert caplog.text.count("cannot undo the jump on probation") == 2


class Resumed:
    """A hook that has resumed, perhaps with a jump on probation."""

    def __init__(self, *, is_on_probation: bool = True) -> None:
        self.is_on_probation = is_on_probation
        self.copy = RollbackCopy.allocate(64)

    def load_rollback_copy(self, state: Any) -> None:
        self.copy.load_state_dict(state)

    def end_probation(self) -> None:
        self.is_on_probation = False


def whole_copy() -> dict[str, Any]:
    copy = RollbackCopy.allocate(64)
    copy.save({"0": torch.ones(2)}, {})
    return copy.state_dict()


@pytest.mark.parametrize("damage", ["none", "cut", "empty", "text", "folder", "list", "dictionary", "other rank's"])
def test_a_jump_whose_copy_is_damaged_stays_with_one_warning(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = rollback_path(tmp_path, 0)
    torch.save({"list": [1], "dictionary": {"a": 1}}.get(damage, whole_copy()), path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif damage in ("empty", "text"):
        path.write_text("" if damage == "empty" else "Dear diary")
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    hook: Any = Resumed()
    others = [(True, "cut off")] if damage == "other rank's" else [(True, "")]
    load_rollback_copy(hook, tmp_path, None, AloneRanks(others))
    assert hook.is_on_probation == (damage == "none")
    assert len(caplog.records) == (damage != "none")


@pytest.mark.parametrize("is_on_probation", [False, True])
def test_ranks_that_disagree_about_a_probation_end_it_together(is_on_probation: bool, tmp_path: Path) -> None:
    torch.save(whole_copy(), rollback_path(tmp_path, 0))
    hook: Any = Resumed(is_on_probation=is_on_probation)
    others = [(not is_on_probation, "it knows of no jump" if is_on_probation else "")]
    ranks = AloneRanks(others)
    load_rollback_copy(hook, tmp_path, None, ranks)
    # Whatever this rank knows of, it has said so to the others.
    assert ranks._others == []
    assert not hook.is_on_probation


@pytest.mark.parametrize(("saved", "is_with_others"), [(True, True), (True, False), (False, True), (False, False)])
def test_all_ranks_continue_a_run_or_none(
    saved: bool, is_with_others: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed: list[Any] = []
    attachment = attachment_at(500, resumed)
    # Whether somebody cannot map anew, whether they have the state, and their probations.
    attachment._ranks = AloneRanks([""], [is_with_others], [(False, "")])
    attachment.resume({"run_id": "ours", "step": 500, "epoch": 2} if saved else None, tmp_path)
    continues, run_id = resumed
    assert (continues, run_id == "ours") == (saved and is_with_others, saved and is_with_others)
    assert caplog.text.count("nowcasting begins anew on all ranks") == (saved != is_with_others)


def test_what_another_rank_cannot_map_all_refuse(tmp_path: Path) -> None:
    attachment = attachment_at(500, [])
    attachment._ranks = AloneRanks(["moved away"])
    with pytest.raises(ConfigError, match="moved away"):
        attachment.resume(None, tmp_path)
