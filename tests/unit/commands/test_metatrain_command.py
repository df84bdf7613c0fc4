"""``sidecast metatrain``: from small models to weights that predictors take, and what is kept on the way."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sidecast.commands.__main__ import main
from sidecast.metatraining import trajectories
from sidecast.metatraining.presets import PRESETS
from sidecast.metatraining.trajectories import TrajectoryStore
from sidecast.predictors.base import History
from sidecast.predictors.registry import create_predictor
from tests.support import farm_runs
from tests.support.farm_runs import one_thread
from tests.support.small_trajectories import SOURCE

MANIFEST = SOURCE.task.model.build().manifest


@pytest.fixture(autouse=True)
def _small_and_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trajectories, "load_corpus", lambda name, cache: farm_runs.corpus())
    for module in ("trajectories", "running"):
        monkeypatch.setattr(f"sidecast.metatraining.{module}.native_gradients", lambda *arguments: None)
    with one_thread():
        yield


def command(out: Path, *arguments: str) -> list[str]:
    return ["metatrain", "--preset", "ci", "--out", str(out), *arguments]


def test_weights_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(tmp_path)) == 0
    shown = capsys.readouterr().err
    assert "trajectories 1 of 2: training-smoke-constant-0, 1 runs of 40 steps" in shown
    assert "nino: to be better than the straight line: loss" in shown
    states = [farm_runs.TASK.model.build().initial(0) * (1 + 0.01 * position) for position in range(5)]
    for name in ("nino", "wnn_plus", "wnn"):
        predictor = create_predictor(name, weights=tmp_path / f"{name}.safetensors")
        delta = torch.zeros(MANIFEST.num_elements)
        predictor.predict(History(MANIFEST, states), 4, delta)
        assert delta.abs().max() > 0
    # What is there is not made again, and gives the same weights.
    files = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    (tmp_path / "wnn.unfinished.pt").unlink()
    assert main(command(tmp_path)) == 0
    shown = capsys.readouterr().err
    assert "trajectories" not in shown.replace(str(tmp_path), "")
    assert "goes on from step 6" in shown
    assert {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")} == files


def test_the_layout_goes_with_the_weights(tmp_path: Path) -> None:
    from sidecast.predictors.nino.weights import load_weights

    assert main(command(tmp_path, "--nowcasters", "wnn_plus", "--layout", "official")) == 0
    assert load_weights(tmp_path / "wnn_plus.safetensors").layout == "official"
    assert not (tmp_path / "nino.safetensors").exists()


def test_trajectories_are_those_of_the_farm(tmp_path: Path) -> None:
    store = TrajectoryStore(tmp_path, 1 << 30)
    store.ensure(PRESETS["ci"].sources, lambda line: None)
    source = PRESETS["ci"].sources[0]
    trajectory = store.load(source)[0]
    alone = farm_runs.GroupRun(source.task, [farm_runs.corpus()], source.members(), trajectories._ENGINE)
    assert torch.equal(trajectory.states_NP[0], alone.params_MP[0].half())
    alone.advance(40)
    assert torch.equal(trajectory.states_NP[-1], alone.params_MP[0].half())
    # One that was cut short is made again, the other is left alone.
    path = tmp_path / "trajectories" / f"{source.name}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    lines: list[str] = []
    store.ensure(PRESETS["ci"].sources, lines.append)
    assert len(lines) == 1
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--max-gib", "0"], "--max-gib is 0.0; it must be above 0"),
        (["--max-gib", "0.0001"], r"the trajectories take [\d,]+ bytes; allowed are 107,374 \(--max-gib\)"),
        (["--seed", "-1"], "seed is -1; it must be at least 0"),
    ],
)
def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    import re

    assert main(command(tmp_path, *arguments)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.glob("*.safetensors"))
