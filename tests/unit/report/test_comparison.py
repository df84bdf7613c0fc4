from __future__ import annotations

from typing import Any

import pytest

from sidecast.trainer.report.comparison import (
    EqualBudgetComparison,
    RunComparison,
    RunCurves,
    first_crossing,
    first_difference,
    nowcast_cost,
    smoothed,
    verdict,
)


def curves(
    validation: list[float],
    train: list[float] = (1.0,),  # type: ignore[assignment]
    schedule: str = "constant",
    **summary: Any,
) -> RunCurves:
    records: list[dict[str, Any]] = [
        {"kind": "run", "training": {"schedule": {"kind": schedule}}},
        *(
            {"kind": "train", "step": step, "loss": loss, "training_s": 10.0}
            for step, loss in enumerate(train, start=1)
        ),
    ]
    records += [
        {"kind": "validation", "step": 100 * index, "loss": loss} for index, loss in enumerate(validation, start=1)
    ]
    return RunCurves.of([*records, {"kind": "summary", "training_s": 10.0, **summary}])


def test_saved_steps_are_counted_to_the_baselines_best_loss() -> None:
    judged = verdict(curves([3.0, 2.0, 1.0]), curves([3.0, 2.5, 2.0]))
    assert judged is not None
    assert (judged.target_loss, judged.baseline_steps, judged.steps) == (2.0, 300, 200)
    assert judged.sentence.startswith("100 steps saved against the run without nowcasts (33.3%)")


def test_a_run_that_arrives_later_has_lost_steps() -> None:
    judged = verdict(curves([3.0, 2.5, 2.0, 1.5]), curves([3.0, 2.0, 2.2, 2.4]))
    assert judged is not None
    assert judged.sentence.startswith("100 steps lost against the run without nowcasts")


def test_less_than_the_spacing_of_validations_is_about_even() -> None:
    judged = verdict(curves([3.0, 2.5, 1.9]), curves([3.0, 2.5, 2.0]))
    assert judged is not None
    assert not judged.has_saved
    assert judged.sentence.startswith("About even: +17 steps saved, less than the 100 steps")


@pytest.mark.parametrize(("loss", "words"), [(1.9, "0.1000 lower than"), (2.25, "0.2500 higher than")])
def test_runs_that_decay_are_compared_at_their_end_and_not_on_the_way(loss: float, words: str) -> None:
    # On the way it is behind, and where it passes the other's last loss tells the decay's shape and nothing else.
    judged = verdict(curves([3.0, 2.9, loss], schedule="cosine"), curves([3.0, 2.1, 2.0], schedule="cosine"))
    assert isinstance(judged, EqualBudgetComparison)
    assert judged.has_saved == (loss < 2.0)
    assert judged.sentence == (
        f"After 300 steps the validation loss is {loss:.4f}, {words} the run without nowcasts under the same cosine "
        "decay (2.0000)."
    )


def test_the_same_loss_at_the_end_is_said_to_be_no_different() -> None:
    judged = verdict(curves([3.0, 2.0], schedule="wsd"), curves([3.0, 2.0], schedule="wsd"))
    assert judged is not None
    assert not judged.has_saved
    assert "2.0000, no different from that of the run without" in judged.sentence


@pytest.mark.parametrize(("num_validations", "schedule"), [(2, "cosine"), (3, "wsd"), (3, "constant")])
def test_ends_of_unlike_runs_are_not_compared(num_validations: int, schedule: str) -> None:
    other = curves([3.0, 2.1, 2.0][:num_validations], schedule=schedule)
    assert isinstance(verdict(curves([3.0, 2.0, 1.9], schedule="cosine"), other), RunComparison)


def test_a_run_that_never_arrives_says_how_far_behind_it_is() -> None:
    judged = verdict(curves([3.0, 2.5, 2.2]), curves([3.0, 2.0, 1.0]))
    assert judged is not None
    assert judged.steps is None
    assert judged.behind_steps == pytest.approx(300 - 180)
    assert "did not reach" in judged.sentence


def test_crossings_are_interpolated() -> None:
    assert first_crossing([(0, 4.0), (10, 2.0), (20, 3.0)], 3.0) == 5.0
    assert first_crossing([(7, 1.0)], 2.0) == 7
    assert first_crossing([(7, 3.0)], 2.0) is None


def test_cost_is_the_slowest_ranks_and_all_ranks_bytes() -> None:
    ranks = [
        {"blocked_s": 0.1, "staging_s": 0.05, "bytes_uploaded": 5, "bytes_fetched": 1, "nowcast_s": [0.5]},
        {"blocked_s": 0.2, "staging_s": 0.01, "bytes_uploaded": 6, "bytes_fetched": 2, "nowcast_s": [0.5]},
    ]
    cost = nowcast_cost(curves([1.0], nowcaster=ranks))
    assert cost is not None
    assert (cost.blocked_s, cost.staging_s, cost.blocked_share) == (0.2, 0.05, pytest.approx(0.02))
    assert (cost.bytes_uploaded, cost.bytes_fetched, cost.nowcast_s) == (11, 3, (0.5,))
    assert nowcast_cost(curves([1.0], nowcaster=None)) is None


def test_smoothing_keeps_ends_and_straight_lines() -> None:
    line = [(float(step), 2.0 * step) for step in range(9)]
    assert list(smoothed(line, 5)) == line


def test_the_first_difference_is_found_to_the_bit() -> None:
    baseline = curves([1.0], [1.0, 2.0, 3.0])
    assert first_difference(curves([1.0], [1.0, 2.0, 3.0]), baseline) is None
    assert first_difference(curves([1.0], [1.0, 2.0 + 2**-50, 3.0]), baseline) == 2
