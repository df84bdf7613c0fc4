"""Nothing that we started outlives us, whichever way we end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from sidecast.trainer.demo.children import Children, last_reason
from tests.support.limits import HANG_S

# A child that starts one of its own and ignores polite requests, as a hung rank does.
STUBBORN = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
if os.fork():
    print("ready", flush=True)
signal.pause()
"""
POLITE = STUBBORN.replace("signal.SIG_IGN", "signal.SIG_DFL")
PARENT = """
import os, signal, sys
from pathlib import Path
from sidecast.trainer.demo.children import Children
# Whoever runs the tests in the background of a shell ignores it, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
with Children() as children:
    child = children.start("child", [sys.executable, "-c", sys.argv[1]], Path(sys.argv[2]), os.environ)
    while "ready" not in child.log_path.read_text():
        assert child.process.poll() is None
    print(child.process.pid, flush=True)
    # Not pause(): a signal that comes just before it is noted, but does not end it.
    while True:
        signal.sigtimedwait([], 0.1)
"""


def start_parent(program: str, log_path: Path) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    command = [sys.executable, "-c", PARENT, program, str(log_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    family = [child, *child.children(recursive=True)]
    assert len(family) == 2
    return parent, family


def survivors(family: list[psutil.Process]) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(family, timeout=HANG_S)
    return [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_children_end_with_their_parent(tmp_path: Path, number: signal.Signals) -> None:
    parent, family = start_parent(POLITE, tmp_path / "child.log")
    parent.send_signal(number)
    parent.communicate()
    assert parent.returncode != 0
    assert survivors(family) == []


def test_a_child_that_ignores_requests_is_killed_with_its_own_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecast.trainer.demo.process_groups.LEADER_GRACE_S", 0.2)
    monkeypatch.setattr("sidecast.trainer.demo.process_groups.GROUP_GRACE_S", 0.2)
    with Children() as children:
        child = children.start("child", [sys.executable, "-c", STUBBORN], tmp_path / "child.log", os.environ)
        while "ready" not in child.log_path.read_text():
            assert child.process.poll() is None
        leader = psutil.Process(child.process.pid)
        family = [leader, *leader.children()]
    assert len(family) == 2
    assert child.process.returncode == -signal.SIGKILL
    assert survivors(family) == []


def test_a_failure_is_one_line_with_the_reason_and_the_log(tmp_path: Path) -> None:
    program = "import sys; sys.stderr.write('noise\\nsidecast: error: no corpus\\nmore noise\\n'); sys.exit(2)"
    with Children() as children:
        child = children.start("training", [sys.executable, "-c", program], tmp_path / "child.log", os.environ)
        child.process.wait()
        message = str(child.failure())
    assert message == f"training ended with status 2: no corpus (its log: {tmp_path / 'child.log'})"


def test_the_reason_is_a_refusal_or_else_the_last_exception() -> None:
    assert last_reason(["[rank1]: ValueError: bad", "sidecast: error: no corpus", "x.y.SomeError: z"]) == "no corpus"
    assert last_reason(["ValueError: first", "[rank0]: torch.OutOfMemoryError: last", "bye"]) == (
        "torch.OutOfMemoryError: last"
    )
    assert last_reason(["all is well"]) is None
