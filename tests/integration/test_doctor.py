"""``sidecast doctor``: each fault that it knows, brought about."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecast.commands import doctor, host_checks
from sidecast.commands.__main__ import main
from sidecast.commands.host_checks import Finding, look_at_host


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Finding]]:
    """Looks at this host, with folders of our own for what others leave."""
    (tmp_path / "shm").mkdir()
    monkeypatch.setattr(host_checks, "SHARED_MEMORY", tmp_path / "shm")

    def find(name: str, **settings: Any) -> list[Finding]:
        findings = list(look_at_host(extensions_dir=tmp_path / "extensions", **settings))
        return [finding for finding in findings if finding.name == name]

    return find


def test_a_lock_that_nobody_holds_is_a_fault_and_is_removed_on_demand(
    look: Callable[..., list[Finding]], tmp_path: Path
) -> None:
    held, left, young, deep = (
        tmp_path / "extensions" / name / "lock" for name in ("held", "py311/left", "young", "a/b/c")
    )
    for lock in (held, left, young, deep):
        lock.parent.mkdir(parents=True)
        lock.touch()
        if lock is not young:
            os.utime(lock, (0, 0))
    with held.open():
        (finding,) = look("extensions")
        assert finding.verdict == "fault"
        assert finding.text.startswith(f"{left} is held by nobody here")
        (finding,) = look("extensions", should_clean=True)
        assert finding == Finding(name="extensions", verdict="note", text=f"{left} was held by nobody, and is removed")
        assert [lock.exists() for lock in (held, left, young, deep)] == [True, False, True, True]
        assert [finding.verdict for finding in look("extensions")] == ["ok"]


def test_buffers_that_nobody_has_are_told_of_and_removed_on_demand(
    look: Callable[..., list[Finding]], tmp_path: Path
) -> None:
    paths = [tmp_path / "shm" / f"deepspeed_allreduce_buffer_0_127.0.0.1_29500_{rank}" for rank in range(2)]
    for path in (*paths, tmp_path / "shm" / "another program's"):
        path.write_bytes(bytes(1 << 20))
    with paths[0].open():
        _, finding = look("/dev/shm")
        assert finding.text == "1 buffers of 1 MiB that ended DeepSpeed jobs have left (--clean removes them)"
        look("/dev/shm", should_clean=True)
        assert sorted(path.name for path in (tmp_path / "shm").iterdir()) == ["another program's", paths[0].name]


@pytest.mark.parametrize(("free_bytes", "verdict"), [(1 << 20, "fault"), (1 << 33, "ok")])
def test_little_shared_memory_is_a_fault(
    look: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch, free_bytes: int, verdict: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=free_bytes))
    (finding,) = look("/dev/shm")
    assert finding.verdict == verdict


def test_a_missing_compiler_is_a_fault(look: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (finding,) = look("compiler")
    assert finding.verdict == "fault"
    assert "apt-get install g++" in finding.text


@pytest.mark.parametrize(
    ("address", "words"),
    [("192.0.2.1", "is no address of this host"), ("127.0.0.1", "ranks on other hosts cannot reach it")],
)
def test_a_host_name_that_leads_elsewhere_is_told_of(
    look: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch, address: str, words: str
) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    (finding,) = look("host name")
    assert finding.verdict == "note"
    assert words in finding.text


def test_proxies_are_told_of_by_name_alone(look: Callable[..., list[Finding]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://user:password@proxy")
    finding = look("network")[-1]
    assert finding.text.startswith("https_proxy")
    assert "password" not in finding.text


@pytest.mark.parametrize(
    ("status", "out", "err", "expected"),
    [
        (0, "sidecast 1.0, up 3 s\nrun a\n", "", ("ok", "sidecast 1.0, up 3 s")),
        (
            1,
            "sidecast 1.0, up 3 s\nno nowcasts: no engine\n",
            "",
            ("fault", "sidecast 1.0, up 3 s; no nowcasts: no engine"),
        ),
        (2, "", "sidecast: no service can be reached\n", ("fault", "no service can be reached")),
    ],
)
def test_a_service_is_asked_with_what_was_given(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    out: str,
    err: str,
    expected: tuple[str, str],
) -> None:
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, status, out, err)

    monkeypatch.setattr(doctor, "look_at_host", lambda should_clean: iter(()))
    monkeypatch.setattr(subprocess, "run", run)
    assert main(["doctor", "host:1", "--token-file", "a", "--tls-ca", "b", "--json"]) == int(status != 0)
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["verdict"], finding["text"]) == expected
    assert asked[0][-5:] == ["host:1", "--token-file", "a", "--tls-ca", "b"]


def test_it_writes_a_line_for_each_finding_and_ends_with_1_if_one_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    findings = [Finding(name="a", verdict="ok", text="good"), Finding(name="b", verdict="fault", text="bad")]
    monkeypatch.setattr(doctor, "look_at_host", lambda should_clean: iter(findings))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == ["  a            good", "! b            bad"]
    del findings[1]
    assert main(["doctor"]) == 0


def test_extensions_are_looked_for_where_torch_puts_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert host_checks.default_extensions_dir() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert host_checks.default_extensions_dir() == tmp_path / "torch_extensions"
