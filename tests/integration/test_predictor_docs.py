"""The predictor that the documentation shows works as a package of someone else's."""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.predictors import registry
from sidecast.predictors.base import History
from sidecast.predictors.passes import PassPredictor
from sidecast.predictors.registry import create_predictor, predictor_names

PAGE = Path(__file__).parents[2] / "docs" / "predictors.md"


def block(language: str, first_line: str) -> str:
    found = re.search(rf"```{language}\n({re.escape(first_line)}\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip would put on the path."""
    project = tomllib.loads(block("toml", "# pyproject.toml"))["project"]
    (tmp_path / "damped.py").write_text(block("python", "# damped.py"))
    metadata = tmp_path / f"{project['name']}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    lines = [f"[{group}]\n" for group in project["entry-points"]]
    lines += [f"{name} = {value}\n" for name, value in project["entry-points"]["sidecast.predictors"].items()]
    (metadata / "entry_points.txt").write_text("".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "damped", raising=False)


@pytest.mark.usefixtures("installed")
def test_the_documented_predictor_works() -> None:
    manifest = ModelManifest.from_shapes([("a", [4, 5]), ("b", [3])])
    states = [torch.randn(manifest.num_elements) for _ in range(3)]
    predictor = create_predictor("damped", options={"damping": 0.5})
    assert isinstance(predictor, PassPredictor)
    out = torch.empty(manifest.num_elements)
    predictor.predict(History(manifest, states), 2, out)
    torch.testing.assert_close(out, 0.75 * (states[-1] - states[-2]))
    halves = [state.bfloat16() for state in states]
    create_predictor("damped", options={"damping": 0.7}).predict(History(manifest, halves), 2, out)
    torch.testing.assert_close(out, 1.19 * (halves[-1].float() - halves[-2].float()))
    states[0][21] = torch.nan
    with pytest.raises(ConfigError, match="'b' has NaN"):
        predictor.predict(History(manifest, states), 2, out)


def test_the_page_lists_every_predictor_and_its_options() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\|.*\|(.*)\|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert sorted(name for name, _, _ in rows) == predictor_names()
    documented: dict[str, str] = {}
    for name, options, weights in rows:
        # "The same" as in the row before.
        documented = documented if "the same" in options else dict(re.findall(r"`(\w+)`(?: \(([^)]*)\))?", options))
        parameters = dict(inspect.signature(registry._factories()[name].load()).parameters)
        assert ("weights" in parameters) is (weights.strip() == "yes"), name
        taken = {key: value for key, value in parameters.items() if value.kind is value.KEYWORD_ONLY}
        assert documented.keys() == taken.keys() - {"weights"}, name
        for option, default in documented.items():
            assert default in ("", repr(taken[option].default)), f"{option} of {name}"
