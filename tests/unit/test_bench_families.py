"""The benchmark of families: what is right counts, and what fails is named and ends nothing."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import transformers

from benchmarks import bench_families
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


def test_what_takes_too_long_is_refused_wherever_it_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGALRM)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    assert outcome_of("llama").refusal == f"not done in {bench_families.MAX_SECONDS} s"


def test_a_model_without_an_effect_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    topology = SimpleNamespace(family="axis_graph", parameters=[SimpleNamespace(fqn="a", numel=3)])
    check = SimpleNamespace(num_moved_elements=0, num_elements=3, without_effect=("a",))
    monkeypatch.setattr(bench_families, "check_config", lambda config, linear_layers: (topology, check))
    assert outcome_of("llama").refusal == "its graph moves only 0%"
