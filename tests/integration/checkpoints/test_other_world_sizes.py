"""DeepSpeed jobs that go on with another number of ranks keep what the service holds, and say what is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.local_engines import LocalEngines
from tests.support.programs.scripts import run_script
from tests.support.services.harness import RunningService

RUNS = Path(__file__).with_name("other_world_sizes.py")
# Of the worker, which imports DeepSpeed.
PERIOD_STEPS, SAVE_STEP = 20, 26


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    with RunningService(folder / "service", engines=LocalEngines()) as service:
        run_script(RUNS, folder, service.endpoint)
    return folder


def seen_in(folder: Path, case: str) -> dict[str, Any]:
    """What the first rank of the resumed job saw, in which no vote or window was lost."""
    seen: dict[str, Any] = json.loads((folder / f"{case}.json").read_text())
    assert (seen["step"], seen["epoch"], seen["is_same_run"]) == (SAVE_STEP, 1, True)
    # A window of this jump begins before the checkpoint, with a state that other ranks have sent.
    assert SAVE_STEP > PERIOD_STEPS + PERIOD_STEPS // 5
    assert [step for kind, step in seen["events"] if kind == "applied"] == [2 * PERIOD_STEPS]
    return seen | {"verdicts": [step for kind, step in seen["events"] if kind in ("accepted", "rolled_back")]}


def test_a_rank_that_holds_the_whole_model_can_still_undo_the_jump(folder: Path) -> None:
    seen = seen_in(folder, "stage 0")
    assert (seen["is_on_probation"], seen["verdicts"], seen["warnings"]) == (True, [3 * PERIOD_STEPS // 2], [])


@pytest.mark.parametrize("case", ["stage 2", "stage 3"])
def test_parts_of_other_ranks_are_no_way_back_and_one_warning_says_so(folder: Path, case: str) -> None:
    seen = seen_in(folder, case)
    assert (seen["is_on_probation"], seen["verdicts"]) == (False, [])
    (warning,) = seen["warnings"]
    assert "has no rollback copy, the jump on probation cannot be undone" in warning
