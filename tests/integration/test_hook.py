"""Two gloo ranks with couriers, a service in this process, and a fake partition under the hook."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sidecast.trainer.hook.vote import ANOTHER_RANK
from tests.support.programs.program import run_ranks
from tests.support.services.harness import RunningService

WORKER = Path(__file__).with_name("workers") / "hook_worker.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks saw."""
    folder = tmp_path_factory.mktemp("hook")
    with RunningService(folder / "service") as service:
        statuses, logs = run_ranks(WORKER, [folder, service.endpoint], 2, folder)
    assert statuses == [0, 0], logs
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def steps_of(result: dict[str, Any], kind: str) -> list[int]:
    return [step for event, step, _ in result["events"] if event == kind]


def details_of(result: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [details for event, _, details in result["events"] if event == kind]


def test_votes_are_read_alike_by_all(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["votes"] == ranks[1]["votes"]
    unanimous, split, empty = ranks[0]["votes"]
    assert unanimous == [3, 77, 1, (1.5 + 2.5) / 4, 4]
    assert split[0] == empty[0] == -1
    assert empty[3] is None


def test_a_rank_that_leaves_is_found_gone_in_whichever_round_is_next(ranks: list[dict[str, Any]]) -> None:
    ended = [False, ANOTHER_RANK]
    assert ranks[0]["departures"] == [ended, ended, 0]
    assert ranks[1]["departures"] == [[-1, 0], ended, [3, None, ANOTHER_RANK, 0], ended, 1]


def test_groups_that_have_ended_leave_no_descriptor_and_no_thread(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        # A group takes five descriptors and three threads; some are given back by gloo a moment later.
        (first_descriptors, first_threads), *_, (descriptors, threads) = rank["leftovers"]
        assert descriptors - first_descriptors < 5
        assert threads - first_threads < 3


@pytest.mark.parametrize(("name", "applied"), [("at-vote", []), ("on-probation", [22])])
def test_a_hook_closed_on_one_rank_ends_nowcasting_on_all_and_training_on_none(
    ranks: list[dict[str, Any]], name: str, applied: list[int]
) -> None:
    results = [rank[f"closed-by-one-{name}"] for rank in ranks]
    for result in results:
        assert len(result["weights"]) in (30, 40)
        assert steps_of(result, "applied") == applied
        assert steps_of(result, "rolled_back") == []
    (details,) = details_of(results[1], "suspended")
    assert details["reason"] == "rank 0 has closed its hook"


def test_what_one_rank_refuses_all_ranks_raise(ranks: list[dict[str, Any]]) -> None:
    assert [rank["refusal"] for rank in ranks] == ["rank 1 lacks the memory"] * 2


def test_a_resumed_probation_needs_every_ranks_rollback_copy(ranks: list[dict[str, Any]]) -> None:
    assert [rank["probations"] for rank in ranks] == [[True, False]] * 2


def test_all_ranks_apply_at_the_step_after_the_last_one_holds_it(ranks: list[dict[str, Any]]) -> None:
    # Rank 0 has it at step 21, rank 1 at step 23: voted there, read one step later.
    for rank in ranks:
        assert steps_of(rank["accepted"], "applied") == [24]
        (details,) = details_of(rank["accepted"], "applied")
        assert (details["base_step"], details["staleness_steps"]) == (20, 4)
        assert details["weight"] == pytest.approx(1 - 4 / 50)
        assert steps_of(rank["accepted"], "accepted") == [36]
    digests = {details_of(rank["accepted"], "applied")[0]["digest"] for rank in ranks}
    assert len(digests) == 1


def test_a_jump_adds_the_weighted_delta_to_the_weights_of_now(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        jumped, calm = rank["accepted"]["weights"], rank["stale"]["weights"]
        assert jumped[:23] == calm[:23]
        delta = [newest - oldest for newest, oldest in zip(calm[19], calm[9], strict=True)]
        expected = [now + (1 - 4 / 50) * change for now, change in zip(calm[23], delta, strict=True)]
        assert jumped[23] == pytest.approx(expected, abs=1e-6)


def test_a_harmful_jump_is_undone_bit_for_bit_and_two_suspend(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["harmful"]
        assert steps_of(result, "applied") == [24, 64 - 1]
        assert steps_of(result, "rolled_back") == [36, 75]
        assert steps_of(result, "suspended") == [75]
        # What the jump saw, before the jump: what training alone makes of step 23, at step 24.
        assert result["weights"][35] == rank["stale"]["weights"][23]
        assert result["summary"]["suspended"]
        assert result["summary"]["epoch"] == 4


def test_a_loss_that_is_no_number_is_undone_at_once(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        (step,) = steps_of(rank["nan"], "rolled_back")
        assert 24 < step <= 27


def test_a_prediction_that_comes_too_late_is_never_applied(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert steps_of(rank["stale"], "applied") == []
        assert details_of(rank["stale"], "rejected")[0]["reason"] == "its base is 10 steps old"


def test_nobody_jumps_while_one_ranks_tensors_are_elsewhere(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        # Rank 1 votes for it from step 24 on.
        assert steps_of(rank["moved-at-vote"], "applied") == [25]
        assert steps_of(rank["moved-at-vote"], "rejected") == []


def test_tensors_that_move_between_vote_and_jump_keep_every_rank_from_jumping(ranks: list[dict[str, Any]]) -> None:
    for rank, reason in zip(ranks, ("another rank could not prepare for it", "somebody moved it"), strict=True):
        assert steps_of(rank["moved-at-jump"], "applied") == []
        assert steps_of(rank["moved-at-jump"], "rejected") == [22]
        assert details_of(rank["moved-at-jump"], "rejected")[0]["reason"] == reason
        assert rank["moved-at-jump"]["weights"] == rank["stale"]["weights"][:30]


def test_a_decaying_learning_rate_weakens_the_jump_alike_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        (details,) = details_of(rank["decaying"], "applied")
        assert details["weight"] == pytest.approx((1 - 2 / 50) * 0.25 / 0.5)


def test_a_rollback_waits_until_every_rank_can_make_it(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        result = rank["moved-at-rollback"]
        assert steps_of(result, "applied") == [22]
        assert steps_of(result, "rollback_delayed") == [34]
        assert steps_of(result, "rolled_back") == [36]
        assert result["weights"][35] == rank["stale"]["weights"][21]


def test_sync_mode_jumps_at_the_base_step_with_full_weight(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert steps_of(rank["sync"], "applied") == [20]
        (details,) = details_of(rank["sync"], "applied")
        assert (details["staleness_steps"], details["weight"]) == (0, 1.0)


def test_a_replay_equals_the_run_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["replayed"] == rank["harmful"]["weights"]
