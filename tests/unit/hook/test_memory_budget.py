"""What is allocated, what there is, and the refusal that compares them."""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.memory_budget import GIB, RankMemory, available_bytes, needs_of, require_room
from sidecast.trainer.hook.rollback_memory import reserve_rollback_copy
from sidecast.trainer.partitions.rollback import RollbackError

PARTITION: Any = SimpleNamespace(
    upload_shards=(ShardSpec(0, 0, 25),), owned_shards=(ShardSpec(0, 0, 100),), rollback_bytes=lambda: 1200
)


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, {"staging": 200, "prediction": 400, "rollback": 1200}),
        ({"rollback": "off"}, {"staging": 200, "prediction": 400}),
        ({"rollback": "off", "mode": "sync"}, {"staging": 100, "prediction": 400}),
        ({"rollback": "disk", "rollback_dir": "."}, {"staging": 200, "prediction": 400}),
        ({"probation_steps": 0}, {"staging": 200, "prediction": 400}),
        ({"merge": "replace"}, {"staging": 200, "prediction": 400, "base": 400, "rollback": 1200}),
    ],
)
def test_each_purpose_is_counted(settings: dict[str, Any], needs: dict[str, int]) -> None:
    assert needs_of(NowcasterConfig(**settings), PARTITION) == needs


def rank_memory(host: str, needs_gib: float, available_gib: float | None) -> RankMemory:
    available = None if available_gib is None else int(available_gib * GIB)
    return RankMemory(host=f"boot {host}", needs_bytes={"staging": int(needs_gib * GIB)}, available_bytes=available)


@pytest.mark.parametrize(
    ("ranks", "allowed_gib", "words"),
    [
        ([("a", 3, 5), ("a", 3, 6)], None, r"needs 6 GiB .* the 2 ranks on a \(staging 6\), but 5 GiB are available"),
        ([("a", 3, 9), ("b", 3, 2)], None, "the 1 ranks on b .* but 2 GiB are available"),
        ([("a", 3, 9), ("a", 3, 9)], 5.5, "but 5.5 GiB are allowed by nowcaster.max_host_memory_gib"),
        ([("a", 3, None)], 2.0, "but 2 GiB are allowed"),
    ],
)
def test_too_much_is_refused_with_the_numbers(
    ranks: list[tuple[str, float, float | None]], allowed_gib: float | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        require_room([rank_memory(*rank) for rank in ranks], allowed_gib)


@pytest.mark.parametrize(
    "ranks",
    [[("a", 3, 3), ("b", 3, 3)], [("a", 3, None)], [("a", 1, 2), ("a", 1, 2)]],
    ids=["hosts", "unknown", "fits"],
)
def test_what_fits_is_taken(ranks: list[tuple[str, float, float | None]]) -> None:
    require_room([rank_memory(*rank) for rank in ranks], None)


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({}, 8192),
        ({"sys/fs/cgroup/memory.max": "max\n"}, 8192),
        ({"sys/fs/cgroup/memory.max": "5000\n", "sys/fs/cgroup/memory.current": "2000\n"}, 3000),
        # Cached files are given up when memory is wanted.
        (
            {
                "sys/fs/cgroup/memory.max": "5000\n",
                "sys/fs/cgroup/memory.current": "2000\n",
                "sys/fs/cgroup/memory.stat": "anon 100\ninactive_file 1500\n",
            },
            4500,
        ),
        ({"sys/fs/cgroup/memory.max": "5000\n", "sys/fs/cgroup/memory.current": "7000\n"}, 0),
        # A limit of the group around this process's counts, too.
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/memory.max": "700\n",
                "sys/fs/cgroup/job/memory.current": "600\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
            },
            100,
        ),
    ],
    ids=["host", "unlimited", "limit", "cache", "over", "nested"],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], available: int) -> None:
    assert available_bytes(machine(tmp_path, files)) == available


def test_an_unknown_host_sets_no_limit(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None


@pytest.mark.parametrize("settings", [{"rollback": "off"}, {"probation_steps": 0}])
def test_no_copy_where_nothing_is_undone(settings: dict[str, Any]) -> None:
    assert reserve_rollback_copy(NowcasterConfig(**settings), PARTITION) is None


def test_a_copy_on_disk_takes_its_room_at_once_and_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = tmp_path / "rollback"
    copy = reserve_rollback_copy(NowcasterConfig(rollback="disk", rollback_dir=str(folder)), PARTITION)
    assert copy is not None
    assert copy.num_bytes == 1200
    assert list(folder.iterdir()) == []
    copy.save({"a": torch.arange(100.0)}, {"step": 3})
    assert copy.tensors()["a"].equal(torch.arange(100.0))


@pytest.mark.parametrize("access", ["save", "require_readable", "state_dict", "load_state_dict"])
def test_pages_that_the_disk_does_not_give_are_an_error_and_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: str
) -> None:
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: contextlib.nullcontext(file))
        copy = reserve_rollback_copy(NowcasterConfig(rollback="disk", rollback_dir=str(tmp_path)), PARTITION)
        assert copy is not None
        copy.save({"a": torch.arange(100.0)}, {})
        state = {**copy.state_dict(), "buffer": torch.zeros(1200, dtype=torch.uint8)}
        # Touching a page beyond the end is SIGBUS, too, as is one that the disk cannot read.
        file.truncate(0)
        arguments = {"save": ({"a": torch.ones(100)}, {}), "load_state_dict": (state,)}.get(access, ())
        with pytest.raises(RollbackError, match="the disk does not give the rollback copy's pages"):
            getattr(copy, access)(*arguments)


def test_only_a_checkpoint_needs_the_pages_that_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partition: Any = SimpleNamespace(rollback_bytes=lambda: 4 * mmap.PAGESIZE)
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: contextlib.nullcontext(file))
        copy = reserve_rollback_copy(NowcasterConfig(rollback="disk", rollback_dir=str(tmp_path)), partition)
        assert copy is not None
        copy.save({"a": torch.arange(100.0)}, {})
        file.truncate(mmap.PAGESIZE)
        copy.require_readable()
        # It is written whole.
        with pytest.raises(RollbackError, match="the disk does not give the rollback copy's pages"):
            copy.state_dict()


def test_a_disk_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(
        ConfigError,
        match=r"rollback_dir cannot .* no room in .* for 1200 bytes of the rollback copy: No space left on device",
    ):
        reserve_rollback_copy(NowcasterConfig(rollback="disk", rollback_dir=str(tmp_path)), PARTITION)
