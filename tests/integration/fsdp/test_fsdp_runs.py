"""Plain loops with FSDP2 on two ranks beside a service: harmless, together, judged, and resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.workers.fsdp_runs import NUM_RANKS, NUM_STEPS, PERIOD_STEPS, PUSH, SAVE_STEP
from tests.support.local_engines import LocalEngines
from tests.support.programs.scripts import run_script
from tests.support.services.harness import RunningService

RUNS = Path(__file__).resolve().parents[1] / "workers" / "fsdp_runs.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    """What each rank saw."""
    with RunningService(folder / "service", engines=LocalEngines()) as service:
        run_script(RUNS, folder, service.endpoint)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(NUM_RANKS)]


def steps_of(seen: dict[str, Any], *kinds: str) -> list[list[Any]]:
    return [event for event in seen["events"] if event[0] in kinds]


def test_nothing_applied_changes_no_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        plain, nothing = rank["plain"], rank["nothing"]
        assert len(steps_of(nothing, "staged")) == NUM_STEPS // PUSH["interval_steps"]
        assert steps_of(nothing, "applied") == []
        for what in ("losses", "held", "weights"):
            assert nothing[what] == plain[what]


def test_all_ranks_jump_at_the_same_steps_to_the_same_weights(ranks: list[dict[str, Any]]) -> None:
    for name in ("jumps", "replicas"):
        first, other = (rank[name] for rank in ranks)
        applied = [["applied", PERIOD_STEPS], ["applied", 2 * PERIOD_STEPS]]
        assert steps_of(first, "applied") == steps_of(other, "applied") == applied
        assert steps_of(first, "accepted", "rolled_back") == steps_of(other, "accepted", "rolled_back") != []
        assert first["weights"] == other["weights"]
    assert ranks[0]["jumps"]["weights"] != ranks[0]["plain"]["weights"]
    # Each of two ranks is a replica of the other, with its own losses.
    assert ranks[0]["replicas"]["held"] == ranks[1]["replicas"]["held"]
    assert ranks[0]["replicas"]["losses"] != ranks[1]["replicas"]["losses"]


def test_every_loss_of_the_loop_is_seen(ranks: list[dict[str, Any]]) -> None:
    # The last one's vote is not read any more.
    assert ranks[0]["jumps"]["num_losses"] == NUM_RANKS * (NUM_STEPS - 1)


def test_a_distributed_checkpoint_resumes_bit_for_bit_in_the_middle_of_a_probation(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        straight, resumed = rank["jumps"], rank["resumed"]
        later = [event for event in steps_of(straight, "applied", "accepted", "rolled_back") if event[1] > SAVE_STEP]
        assert len(later) >= 2
        assert steps_of(resumed, "applied", "accepted", "rolled_back") == later
        assert resumed["losses"] == straight["losses"][SAVE_STEP:]
        assert resumed["held"] == straight["held"]


def test_whole_models_that_differ_between_ranks_are_refused(ranks: list[dict[str, Any]]) -> None:
    """Scripts seed each rank for itself (detr issue 297) and count on DDP to broadcast (nanoGPT issue 22)."""
    refusals = {rank["begun apart"]["refusal"] for rank in ranks}
    (refusal,) = refusals
    assert "parameter 'few' has other values on rank 1 than on rank 0" in refusal
    assert "put DistributedDataParallel around the model before sidecast.attach" in refusal


def test_whole_models_that_drift_apart_are_never_nowcasted(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        seen = rank["drifted apart"]
        assert steps_of(seen, "applied") == []
        rejected = steps_of(seen, "rejected")
        assert [step for _, step, _ in rejected] == [PERIOD_STEPS, 2 * PERIOD_STEPS]
        assert all("ranks hold other values of the same parameters" in reason for _, _, reason in rejected)
        seen = rank["drifted apart, pushed"]
        assert steps_of(seen, "applied") == []
        assert any("ranks hold other values" in reason for _, _, reason in steps_of(seen, "rejected"))


def test_another_number_of_ranks_goes_on_with_the_history_and_says_what_is_lost(
    ranks: list[dict[str, Any]], folder: Path
) -> None:
    assert steps_of(ranks[0]["saved for one"], "applied") == [["applied", PERIOD_STEPS]]
    alone = json.loads((folder / "alone.json").read_text())
    # A window of this jump begins before the checkpoint.
    assert SAVE_STEP > PERIOD_STEPS + PERIOD_STEPS // 5
    assert steps_of(alone, "applied") == [["applied", 2 * PERIOD_STEPS]]
    # Each rank's copy is of its own shards: the jump that was on probation stays.
    assert [event for event in steps_of(alone, "accepted", "rolled_back") if event[1] < 2 * PERIOD_STEPS] == []
    (warning,) = alone["warnings"]
    assert "the jump on probation cannot be undone: the copy is of other shards than this rank's" in warning


def test_pushes_reach_bf16_models(ranks: list[dict[str, Any]]) -> None:
    first, other = (rank["pushes"] for rank in ranks)
    assert steps_of(first, "applied") == steps_of(other, "applied")
    assert len(steps_of(first, "applied")) >= 5
    assert first["weights"] == other["weights"] != ranks[0]["without pushes"]["weights"]
