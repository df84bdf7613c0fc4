"""FSDP2: what a rank reads is what torch says the model is, and what it writes is what the model computes with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.workers.fsdp_models import CASES
from tests.integration.workers.fsdp_worker import CHECKS, WORLD_SIZES
from tests.support.programs.scripts import run_script

WORKER = Path(__file__).resolve().parents[1] / "workers" / "fsdp_worker.py"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], dict[str, str | None]]:
    """The checks of one case on so many ranks, by name, and what failed."""
    folder = tmp_path_factory.mktemp("fsdp")
    output = run_script(WORKER, folder)

    def found(world_size: int, case: str) -> dict[str, str | None]:
        path = folder / f"{world_size}" / f"{case}.json"
        assert path.is_file(), f"the workers ended before this case did:\n{output[-6000:]}"
        checks: dict[str, str | None] = json.loads(path.read_text())
        return checks

    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_fsdp_partition(results: Callable[[int, str], dict[str, str | None]], world_size: int, case: str) -> None:
    checks = results(world_size, case)
    assert {name: failure for name, failure in checks.items() if failure is not None} == {}
    assert len(checks) == len(CHECKS)
