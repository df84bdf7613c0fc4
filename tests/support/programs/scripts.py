"""Worker scripts as tests run them: to their end, with all that they have said if they fail."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.programs.program import Program
from tests.support.services.process import free_port


def run_script(
    script: Path, *arguments: object, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """Runs a script to its end.

    Args:
        script: Of a worker, which starts its ranks itself if it has several.
        arguments: Of the script.
        environment: Beside what all programs have.
        cwd: Its working directory.

    Returns:
        Its output.

    Raises:
        AssertionError: It has failed; with the end of its output.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        program = Program(script, arguments, log=log, environment=environment, cwd=cwd)
        try:
            status = program.wait()
        finally:
            program.kill()
        output = log.read_text(errors="replace")
    assert status == 0, output[-6000:]
    return output


def alone() -> dict[str, str]:
    """The environment of a job's only rank, as launchers give it."""
    only = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    return {**only, "MASTER_PORT": f"{free_port()}"}
