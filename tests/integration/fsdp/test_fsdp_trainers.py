"""Lightning and the Hugging Face Trainer with FSDP2 on two ranks: they jump together, and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.workers.huggingface_runs import PERIOD_STEPS, SAVE_STEP
from tests.support.programs.scripts import run_script
from tests.support.services.harness import RunningService

RUNS = Path(__file__).resolve().parents[1] / "workers" / "fsdp_trainers.py"
NUM_RANKS = 2
PLAIN_STEPS = PERIOD_STEPS + 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw."""
    pytest.importorskip("lightning")
    folder = tmp_path_factory.mktemp("trainers")
    with RunningService(folder / "service") as service:
        run_script(RUNS, folder, service.endpoint)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def list_of(losses: Any) -> list[float]:
    """In the order of steps; Hugging Face's are named by them."""
    return losses if isinstance(losses, list) else [losses[step] for step in sorted(losses, key=int)]


def steps_of(seen: dict[str, Any], *kinds: str) -> list[list[Any]]:
    return [event for event in seen["events"] if event[0] in kinds]


@pytest.mark.parametrize("kind", ["lightning", "huggingface"])
def test_all_ranks_jump_together_and_nothing_changes_before(ranks: list[dict[str, Any]], kind: str) -> None:
    first, other = (rank[f"{kind} straight"] for rank in ranks)
    assert steps_of(first, "applied") == [["applied", PERIOD_STEPS], ["applied", 2 * PERIOD_STEPS]]
    assert steps_of(first, "applied", "accepted", "rolled_back") == steps_of(
        other, "applied", "accepted", "rolled_back"
    )
    for rank in ranks:
        plain, straight = (list_of(rank[f"{kind} {which}"]["losses"]) for which in ("plain", "straight"))
        per_step = len(plain) // PLAIN_STEPS
        before = slice(0, per_step * PERIOD_STEPS)
        after = slice(per_step * PERIOD_STEPS, per_step * PLAIN_STEPS)
        assert straight[before] == plain[before]
        assert straight[after] != plain[after]


def test_a_resumed_huggingface_run_equals_the_uninterrupted_one(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        straight, resumed = rank["huggingface straight"], rank["huggingface resumed"]
        later = [event for event in steps_of(straight, "applied", "accepted", "rolled_back") if event[1] > SAVE_STEP]
        assert len(later) >= 2
        assert steps_of(resumed, "applied", "accepted", "rolled_back") == later
        assert resumed["weights"] == straight["weights"]


def test_a_resumed_lightning_run_keeps_the_jump_that_only_rank_0_could_undo(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        straight, resumed = rank["lightning straight"], rank["lightning resumed"]
        assert steps_of(straight, "accepted", "rolled_back")[0][1] > SAVE_STEP
        assert steps_of(resumed, "applied") == [["applied", 2 * PERIOD_STEPS]]
        assert steps_of(resumed, "accepted", "rolled_back") == []
