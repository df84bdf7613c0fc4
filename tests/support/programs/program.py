"""Programs of tests, in processes that begin with everything imported that takes seconds.

A rank that imports PyTorch, DeepSpeed and transformers has spent five seconds of a core before its first line. These
are forked from one process of each pytest worker that has done so once. What is to be seen as users start it is started
as users do: see ``tests.support.services.process.launch``.
"""

from __future__ import annotations

import atexit
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.limits import HANG_S
from tests.support.programs.forking import QUIET, forking_context


class Program:
    """A running program, used as one of ``subprocess.Popen``'s.

    Args:
        target: A script, or the name of a module that is run as a program.
        arguments: Of the program.
        log: Where its output goes; it is begun anew.
        environment: Beside the tests' own, and ``QUIET``.
        cwd: Its working directory.

    Attributes:
        pid: Of its process.
    """

    def __init__(
        self,
        target: Path | str,
        arguments: Sequence[object] = (),
        *,
        log: Path,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        log.write_bytes(b"")
        self._process = forking_context().Process(
            target=_run,
            args=(
                target,
                [str(argument) for argument in arguments],
                log.absolute(),
                {**os.environ, **QUIET, **(environment or {})},
                (cwd or Path.cwd()).absolute(),
            ),
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """See ``returncode``."""
        return self.returncode

    def wait(self, timeout: float = HANG_S) -> int:
        """Waits for its end.

        Returns:
            Its exit status.

        Raises:
            subprocess.TimeoutExpired: It runs on after so many seconds.
        """
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"{self.pid}", timeout)
        return self._process.exitcode

    def kill(self) -> None:
        """kill -9, if it still runs."""
        self._process.kill()


def _run(target: Path | str, arguments: list[str], log: Path, environment: dict[str, str], cwd: Path) -> None:
    """What a fresh interpreter does: its output, environment and folder, the program, and what is left for its end."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [str(target), *arguments]
    try:
        if isinstance(target, Path):
            sys.path.insert(0, str(target.parent))
            runpy.run_path(str(target), run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()


def run_ranks(
    target: Path | str,
    arguments: Sequence[object],
    num_ranks: int,
    folder: Path,
    *,
    environment: Mapping[str, str] | None = None,
) -> tuple[list[int], str]:
    """Runs a program on several ranks of this host, to the end of them all.

    Args:
        target: See ``Program``.
        arguments: Of each rank.
        num_ranks: How many.
        folder: For ``rankN.log``.
        environment: Beside ``RANK``, ``LOCAL_RANK``, ``WORLD_SIZE`` and ``LOCAL_SIZE``.

    Returns:
        Exit statuses, and the ends of all logs.

    Raises:
        subprocess.TimeoutExpired: A rank hangs; all are killed.
    """
    logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
    ranks = [
        Program(
            target,
            arguments,
            log=logs[rank],
            environment={
                "RANK": f"{rank}",
                "LOCAL_RANK": f"{rank}",
                "WORLD_SIZE": f"{num_ranks}",
                "LOCAL_SIZE": f"{num_ranks}",
                **(environment or {}),
            },
        )
        for rank in range(num_ranks)
    ]
    try:
        statuses = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return statuses, "\n".join(log.read_text(errors="replace")[-6000:] for log in logs)
