"""Worker scripts as tests start them: with one thread, no GPU, and all that they have said if they fail."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.limits import HANG_S
from tests.support.services.process import free_port

# Everything of a worker takes place on this machine.
QUIET = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}


def run_script(
    script: Path,
    *arguments: object,
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> str:
    """Runs a script to its end.

    Args:
        script: Of a worker, which starts its ranks itself if it has several.
        arguments: Of the script.
        launcher: What Python runs in the script's place, to start it on several ranks.
        environment: Beside what all workers have.
        cwd: Its working directory.

    Returns:
        Its output.

    Raises:
        AssertionError: It has failed; with the end of its output.
    """
    ended = subprocess.run(
        [sys.executable, *launcher, str(script), *(str(argument) for argument in arguments)],
        env={**os.environ, **QUIET, **(environment or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    return ended.stdout


def alone() -> dict[str, str]:
    """The environment of a job's only rank, as launchers give it."""
    only = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return {**only, "MASTER_PORT": f"{free_port()}"}
