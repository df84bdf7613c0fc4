"""What users' DeepSpeed scripts do besides training by the book: judged all the same, and freed when they are done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs.scripts import alone, run_script
from tests.support.services.harness import RunningService

RUNS = Path(__file__).with_name("workers") / "script_runs.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scripts")


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    # Somebody's modules in the working directory are not what a courier imports.
    (folder / "queue.py").write_text("raise SystemExit('not mine')\n")
    with RunningService(folder / "service") as service:
        output = run_script(RUNS, folder, service.endpoint, environment=alone(), cwd=folder)
    assert "courier died" not in output
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return results


def test_a_harmful_jump_is_undone_whatever_begins_the_backward_pass(seen: dict[str, Any]) -> None:
    run = seen["torch_style"]
    assert ["applied", 20] in run["events"]
    assert ["rolled_back", 30] in run["events"]
    # The last one's vote is not read any more.
    assert run["num_losses"] == run["num_steps"] - 1


def test_deepspeeds_monitor_shows_what_was_done(seen: dict[str, Any], folder: Path) -> None:
    for kind in ("applied", "rolled_back"):
        rows = (folder / "monitor" / f"Train_Samples_sidecast_num_{kind}.csv").read_text().split()
        assert rows[0] == f"step,num_{kind}"
        samples = [row.split(",")[0] for row in rows[1:] if row.endswith(",1.0")]
        (step,) = [step for event, step in seen["torch_style"]["events"] if event == kind]
        assert samples[0] == f"{8 * step}"


@pytest.mark.parametrize("what", ["engines", "loops", "sharded loops"])
def test_what_was_attached_and_dropped_leaves_nothing(seen: dict[str, Any], what: str) -> None:
    first, *later = seen[f"ends of {what}"]
    assert first["is_gone"] == [True, True]
    assert first["backward_is_of"] != "backward_passes.py"
    assert (first["our_objects"], first["shared_bytes"]) == ([], 0)
    assert later == [first] * 9


@pytest.mark.parametrize("what", ["an engine", "a loop", "a sharded loop"])
def test_without_losses_no_jump_is_made_and_one_warning_says_so(seen: dict[str, Any], what: str) -> None:
    run = seen[f"no losses of {what}"]
    assert (run["num_applied"], run["num_losses"]) == (0, 0)
    assert len(run["warnings"]) == 1
    assert "no jump is applied as long as too few losses are seen" in run["warnings"][0]
