"""An engine says what it cannot serve when a run opens, not at its first nowcast."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecast.nowcaster_service.nowcasting import Nowcasting, PredictorRequest
from tests.support.golden_models import GoldenCase


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({}, ""),
        ({"max_horizon": 40}, ""),
        ({"max_horizon": 41}, "horizon is 41"),
        ({"context_len": 4}, "context_len is 4; predictor 'nino' needs exactly 5"),
        ({"predictor": "ninoo"}, "predictor is 'ninoo'; allowed: "),
        ({"options": {"layuot": "official"}}, "predictor 'nino' has no option 'layuot'; allowed: "),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(changes: dict[str, object], refusal: str, nino_data: Path) -> None:
    manifest = GoldenCase.load(nino_data, "llama_gqa_tied").manifest
    fields = {"predictor": "nino", "options": {}, "manifest_json": manifest.to_json(), "context_len": 5} | changes
    answer = Nowcasting(nino_data / "nino_no_posw.pt").check(PredictorRequest(**fields))  # type: ignore[arg-type]
    assert answer.refusal.startswith(refusal)
    assert bool(answer.refusal) == bool(refusal)
    assert refusal or answer.max_horizon == 40


def test_an_architecture_without_a_graph_is_refused(nino_data: Path) -> None:
    manifest = GoldenCase.load(nino_data, "llama_gqa_tied").manifest
    text = manifest.to_json().replace('"model_type":"llama"', '"model_type":"mamba"')
    request = PredictorRequest(predictor="nino", options={}, manifest_json=text, context_len=5)
    assert "mamba" in Nowcasting(nino_data / "nino_no_posw.pt").check(request).refusal


def test_a_file_that_holds_no_weights_is_refused(nino_data: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    manifest = GoldenCase.load(nino_data, "llama_gqa_tied").manifest
    request = PredictorRequest(predictor="nino", options={}, manifest_json=manifest.to_json(), context_len=5)
    refusal = Nowcasting(tmp_path / "weights.pt").check(request).refusal
    assert "weights.pt" in refusal
    assert "\n" not in refusal
