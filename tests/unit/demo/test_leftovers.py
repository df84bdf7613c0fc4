"""What a demo takes away behind DeepSpeed, and what it says of what it must not."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sidecast.trainer.demo import __main__ as demo
from sidecast.trainer.demo.children import ChildFailedError
from sidecast.trainer.demo.leftovers import find_lock, free_shared_buffers


def test_only_the_buffers_of_one_launch_are_freed(tmp_path: Path) -> None:
    names = [f"deepspeed_allreduce_buffer_0_127.0.0.1_{port}_{rank}" for port in (1234, 51234) for rank in (0, 1)]
    for name in (*names, "somebody_else_1234_0"):
        (tmp_path / name).touch()
    free_shared_buffers("1234", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*names[2:], "somebody_else_1234_0"}


@pytest.mark.parametrize("is_chosen", [True, False])
def test_a_lock_that_every_start_would_wait_for_is_told(
    is_chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    root = tmp_path if is_chosen else tmp_path / ".cache" / "torch_extensions" / "py311_cpu"
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path)} if is_chosen else {}
    assert find_lock(environment) is None
    demo._note_lock(environment)
    assert capsys.readouterr().err == ""
    lock = root / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    demo._note_lock(environment)
    assert f"if nobody does, remove {lock}" in capsys.readouterr().err
    assert lock.exists()


@pytest.mark.parametrize("status", [0, 3])
def test_a_run_of_the_demo_frees_what_its_launch_has_shared_however_it_ends(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed: list[str] = []
    monkeypatch.setattr(demo, "free_shared_buffers", freed.append)
    monkeypatch.setattr(demo, "_free_port", lambda: 51234)
    arguments = demo._parser().parse_args([])
    command = demo._training_command(arguments, tmp_path / "run", 5, [])
    child: Any = SimpleNamespace(
        process=SimpleNamespace(poll=lambda: status, wait=lambda: status),
        failure=lambda: ChildFailedError("it failed"),
    )
    children: Any = SimpleNamespace(start=lambda *_: child, end=lambda ended: None)
    with contextlib.suppress(ChildFailedError):
        demo._train(children, "run", command, tmp_path / "run", 5, {})
    assert freed == ["51234"]
