"""A Prometheus of a test's own, other processes beside it, and what is asked of it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.support.limits import HANG_S

POLL_INTERVAL_S = 0.2


@dataclass(frozen=True)
class Process:
    """A started process whose output goes to a file."""

    popen: subprocess.Popen[bytes]
    log: Path

    def find(self, pattern: str) -> str | None:
        """The first group of a pattern in the output so far; fails if the process has ended without it."""
        has_ended = self.popen.poll() is not None
        match = re.search(pattern, self.log.read_text())
        if match is None and has_ended:
            pytest.fail(f"{self.log.name} ended with {self.popen.returncode}:\n{self.log.read_text()[-3000:]}")
        return None if match is None else match[1]


class Start(Protocol):
    """Starts a process by a name, which its log has, too."""

    def __call__(self, name: str, command: Sequence[str | Path], **environment: str) -> Process: ...


@contextmanager
def started_processes(folder: Path) -> Iterator[Start]:
    """Lets a test start processes, and ends them in reverse order.

    Args:
        folder: Where their logs go.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start_one(name: str, command: Sequence[str | Path], **environment: str) -> Process:
        log = folder / name
        with log.open("wb") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )
        started.append(popen)
        return Process(popen, log)

    try:
        yield start_one
    finally:
        _end(started)


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    for popen in reversed(started):
        assert popen.stdin is not None
        popen.stdin.close()
        popen.terminate()
    for popen in reversed(started):
        try:
            popen.wait(timeout=HANG_S)
        except subprocess.TimeoutExpired:
            popen.kill()
            popen.wait()


def wait_for(what: str, condition: Callable[[], Any]) -> Any:
    """Polls until the condition holds; other processes give no event to wait on."""
    pause = threading.Event()
    deadline_s = time.monotonic() + HANG_S
    while not (value := condition()):
        if time.monotonic() > deadline_s:
            pytest.fail(f"{what}: not within {HANG_S:g} s")
        pause.wait(POLL_INTERVAL_S)
    return value


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def start_prometheus(start: Start, binary: str, configuration: Path, data: Path) -> str:
    """Starts a Prometheus on a free port and waits until it answers.

    Args:
        start: Starts it.
        binary: The program.
        configuration: Its file of settings; rules beside it.
        data: Where its blocks are, or will be.

    Returns:
        Its URL.
    """
    process = start(
        "prometheus",
        [
            binary,
            f"--config.file={configuration}",
            f"--storage.tsdb.path={data}",
            "--web.listen-address=127.0.0.1:0",
        ],
    )
    address = wait_for("Prometheus", lambda: process.find(r'msg="Listening on" address=(\S+)'))
    wait_for("Prometheus", lambda: "Server is ready" in process.log.read_text() or process.find("(?!)"))
    return f"http://{address}"


def get(url: str, path: str) -> Any:
    """The data of an answer of Prometheus' API."""
    with urllib.request.urlopen(url + path, timeout=10) as reply:
        return json.load(reply)["data"]


def query_rows(url: str, expression: str) -> list[dict[str, Any]]:
    """The series of an instant query, as Prometheus answers it."""
    rows: list[dict[str, Any]] = get(url, f"/api/v1/query?{urllib.parse.urlencode({'query': expression})}")["result"]
    return rows


def query(url: str, expression: str, label: str = "") -> dict[str, float]:
    """The value of each series of an instant query, by one label; an empty name stands for the only series."""
    rows = query_rows(url, expression)
    values = {row["metric"].get(label, ""): float(row["value"][1]) for row in rows}
    assert len(values) == len(rows), f"{expression} has several series per {label!r}: {rows}"
    return values


def evaluated_rules(url: str) -> list[dict[str, Any]]:
    """All rules of all groups, once each has been evaluated and what it records can be asked for."""
    groups = wait_for("the first evaluation of every group", lambda: _groups_if_evaluated(url))
    return [rule for group in groups for rule in group["rules"]]


def _groups_if_evaluated(url: str) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = get(url, "/api/v1/rules")["groups"]
    # It is set when all rules of the group have been evaluated and stored; before, it is the year 1.
    return groups if all(not group["lastEvaluation"].startswith("0001-") for group in groups) else []
