"""Which run a loaded checkpoint continues."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sidecast.trainer.nowcast import attach


@pytest.mark.parametrize(("loaded_step", "is_continued"), [(500, True), (0, False)])
def test_a_run_is_continued_only_at_the_step_of_its_checkpoint(
    loaded_step: int, is_continued: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved = {"run_id": "pretraining", "step": 500, "epoch": 2}
    resumed: list[Any] = []
    partition = SimpleNamespace(upload_shards=(), owned_shards=())
    monkeypatch.setattr(attach, "partition_of", lambda engine: partition)
    monkeypatch.setattr(attach, "_new_session", lambda group, step, state: {"run_id": "fresh"})
    engine = SimpleNamespace(
        global_steps=loaded_step,
        skipped_steps=0,
        load_checkpoint=lambda *_, **__: (str(tmp_path / "model.pt"), {"sidecast": saved, "theirs": 1}),
    )
    hook = SimpleNamespace(
        shards=((), ()), is_on_probation=False, resume=lambda state, *_: resumed.append(state is not None)
    )
    courier = SimpleNamespace(new_session=lambda session: None)
    attach._wrap_load(engine, hook, courier, None)  # type: ignore[arg-type]
    _, client_state = engine.load_checkpoint(str(tmp_path))
    assert resumed == [is_continued]
    assert client_state == {"theirs": 1}
