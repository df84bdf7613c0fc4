"""What a rank reads is what DeepSpeed holds, and what it writes is what every rank's model holds: the whole matrix."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import pytest

from tests.integration.workers.partition_cases import (
    ATTACHED_CASES,
    ATTACHED_WORLD_SIZE,
    CASES_OF_WORLD_SIZE,
    NUM_CHECKS,
)
from tests.support.programs.program import run_ranks

WORKER = Path(__file__).resolve().with_name("workers") / "partition_worker.py"


class Matrix:
    """The results of one process group per world size, each run once, when first asked for.

    Args:
        scratch: Folder for logs, checkpoints and results.
    """

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._logs: dict[int, str] = {}

    def result(self, world_size: int, case: str) -> dict[str, str | None]:
        """The checks of one case, by name, and what failed."""
        if world_size not in self._logs:
            self._logs[world_size] = self._run(world_size)
        path = self._scratch / f"{world_size}" / f"{case}.json"
        assert path.is_file(), f"the workers ended before this case did:\n{self._logs[world_size][-6000:]}"
        return json.loads(path.read_text())

    def _run(self, world_size: int) -> str:
        folder = self._scratch / f"{world_size}"
        folder.mkdir()
        with contextlib.suppress(subprocess.TimeoutExpired):
            run_ranks(WORKER, [folder, folder], world_size, folder)
        return "\n".join((folder / f"rank{rank}.log").read_text(errors="replace") for rank in range(world_size))


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tmp_path_factory.mktemp("partitions"))


@pytest.mark.parametrize(
    ("world_size", "case"),
    [(world_size, case) for world_size, cases in CASES_OF_WORLD_SIZE.items() for case in cases],
)
def test_partition(matrix: Matrix, world_size: int, case: str) -> None:
    checks = matrix.result(world_size, case)
    assert {name: failure for name, failure in checks.items() if failure is not None} == {}
    assert len(checks) == NUM_CHECKS


@pytest.mark.parametrize("case", ATTACHED_CASES)
def test_a_hook_that_applies_nothing_changes_no_bit(matrix: Matrix, case: str) -> None:
    assert matrix.result(ATTACHED_WORLD_SIZE, f"attached-{case}") == {"attached": None}
