"""The benchmark of families: what is right counts, and what fails is named and ends nothing."""

from __future__ import annotations

import pytest

from benchmarks.bench_families import MOST_USED, PRESETS, outcome_of, report


@pytest.mark.parametrize("model_type", ["gpt_neox", "bloom", "qwen2_moe"])
def test_a_family_without_a_builder_is_right(model_type: str) -> None:
    outcome = outcome_of(model_type)
    assert (outcome.refusal, outcome.graph) == ("", "axis_graph")
    assert outcome.moved > 0.9


def test_what_fails_is_named_and_ends_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    report(("no_such_type", "llama"))
    _, first, second, *shares = capsys.readouterr().out.splitlines()
    assert first.endswith("refused: KeyError: 'no_such_type'")
    assert second.endswith("llama, moves 100%")
    assert shares == ["all of these: 1 of 2 right (50%)", "of the 30 most used: 1 of 1 right (100%)"]


def test_the_most_used_are_types_of_transformers() -> None:
    assert set(MOST_USED) <= {*PRESETS["full"], "llama4_text"}
    assert len(set(MOST_USED)) == 30
