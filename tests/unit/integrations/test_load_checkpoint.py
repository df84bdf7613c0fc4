"""Which run a loaded checkpoint continues, and what of it the user gets to see."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.trainer.hook.attachment import NowcastAttachment
from sidecast.trainer.hook.boundary import rollback_path
from sidecast.trainer.hook.ranks import Ranks
from sidecast.trainer.integrations.deepspeed import wrap


def attachment_at(step: int, resumed: list[Any], shards: tuple[Any, ...] = ()) -> NowcastAttachment:
    """A hook on a run whose checkpoint leaves it at a step, with some shards."""
    trainee: Any = SimpleNamespace(
        map_partition=lambda: SimpleNamespace(upload_shards=shards, owned_shards=shards), applied_steps=lambda: step
    )
    hook: Any = SimpleNamespace(
        shards=((), ()),
        is_on_probation=False,
        resume=lambda state, *_, is_kept: resumed.append(is_kept and state is not None),
    )
    courier: Any = SimpleNamespace(new_session=lambda session: resumed.append(session.run_id))
    return NowcastAttachment(trainee, hook, courier, Ranks(None))


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


def test_a_checkpoint_that_changes_what_a_rank_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="changed this rank's partition"):
        attachment_at(500, [], shards=(object(),)).resume(None, tmp_path)


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
