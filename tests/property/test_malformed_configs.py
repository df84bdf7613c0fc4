"""Any model's configuration, however malformed, is drawn or checked, or refused in one line."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sidecast.commands.__main__ import main
from sidecast.commands.tiny_configs import shrunken

TYPES = ("llama", "mixtral", "gpt2", "bert", "gemma2", "opt")
VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from([-1, 0, 1, 7]) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def configuration(model_type: str) -> dict[str, Any]:
    tiny = shrunken(CONFIG_MAPPING[model_type]().to_dict())
    plain: dict[str, Any] = json.loads(json.dumps({**tiny, "architectures": None}))
    return plain


@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), checks=st.booleans())
def test_a_malformed_configuration_is_one_line(data: st.DataObject, checks: bool) -> None:
    config = configuration(data.draw(st.sampled_from(TYPES)))
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=3, unique=True)):
        config[key] = data.draw(VALUES)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config))
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            status = main(["graph", str(file), *(["--check"] if checks else ["--out", f"{folder}/graph.html"])])
    assert status in (0, 2)
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("sidecast: ")]
    assert len(lines) == (status == 2)


@pytest.mark.parametrize(
    "text", ["[]", "3", "", "{", '{"model_type": 3}', '{"model_type": "gemma2", "vocab_size": []}']
)
def test_what_is_no_configuration_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert main(["graph", str(file), "--check"]) == 2
    assert capsys.readouterr().err.count("sidecast: ") == 1
