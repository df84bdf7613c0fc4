"""What the demo empties, and what it trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from sidecast.errors import ConfigError
from sidecast.trainer.demo import __main__ as demo
from sidecast.trainer.demo.__main__ import _empty


def test_an_earlier_demo_is_deleted_and_a_new_folder_made(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "demo"
    _empty(out)
    (out / "service.log").write_text("of the last demo")
    _empty(out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["folder", "file"])
def test_what_is_not_a_demo_is_left_alone(tmp_path: Path, name: str) -> None:
    out = tmp_path / name
    kept = out
    if name == "folder":
        out.mkdir()
        kept = out / "thesis.tex"
    kept.write_text("years of work")
    with pytest.raises(ConfigError, match="would be emptied"):
        _empty(out)
    assert kept.read_text() == "years of work"


def trained(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> tuple[list[list[str]], list[Path]]:
    """The settings of a demo's runs, and the runs that its report shows beside the two that it compares."""
    runs: list[list[str]] = []
    shown: list[Path] = []

    def train(children: object, name: str, command: list[str], *rest: object) -> None:
        runs.append([command[index + 1] for index, word in enumerate(command) if word == "--set"])

    def report(run: Path, baseline: Path, out: Path, beside: list[Path]) -> str:
        shown.extend(beside)
        return ""

    monkeypatch.setattr(demo, "_train", train)
    monkeypatch.setattr(demo, "_free_port", lambda: 1)
    monkeypatch.setattr(demo, "write_report", report)
    arguments = demo._parser().parse_args(["--out", str(out), "--endpoint", "127.0.0.1:1", *options])
    demo.run_demo(arguments)
    return runs, shown


def test_beside_a_decayed_pair_a_third_run_keeps_its_rate_constant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs, beside = trained(monkeypatch, tmp_path / "demo")
    assert runs == [
        ["nowcaster.endpoint=127.0.0.1:1"],
        ["nowcaster.enabled=false"],
        ["nowcaster.enabled=false", 'training.schedule.kind="constant"', "training.schedule.decay_steps=null"],
    ]
    assert beside == [tmp_path / "demo" / "constant_rate_without_nowcasts"]


@pytest.mark.parametrize(
    "options", [["--config", "demo-jumps"], ["--set", "training.schedule.kind=constant"]], ids=["config", "option"]
)
def test_where_the_rate_is_constant_anyway_two_runs_are_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str]
) -> None:
    runs, beside = trained(monkeypatch, tmp_path / "demo", *options)
    assert len(runs) == 2
    assert beside == []


@pytest.mark.parametrize(
    ("options", "titles"),
    [
        ([], ["training with pushes", "training without", "training without, at a constant rate"]),
        (["--config", "demo-jumps"], ["training with jumps", "training without"]),
    ],
    ids=["pushes", "jumps"],
)
def test_it_says_first_what_it_will_run_and_counts_what_it_runs(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    titles: list[str],
) -> None:
    names: list[str] = []
    counted: list[int] = []

    def train(children: object, name: str, command: object, run_dir: object, num_steps: int, *rest: object) -> None:
        names.append(name)
        counted.append(num_steps)

    monkeypatch.setattr(demo, "_train", train)
    monkeypatch.setattr(demo, "_free_port", lambda: 1)
    monkeypatch.setattr(demo, "write_report", lambda *runs: "")
    out = tmp_path / "demo"
    demo.run_demo(demo._parser().parse_args(["--out", str(out), "--endpoint", "h:1", "--steps", "70", *options]))
    said = capsys.readouterr().err
    assert f"trains a small model {len(titles)} times, 70 steps each" in said
    assert [line for line in said.splitlines() if line.startswith("  ")] == [
        f"  {number}. {title}" for number, title in enumerate(titles, 1)
    ]
    assert str(out / "report.html") in said
    assert names == [f"{number} of {len(titles)}: {title}" for number, title in enumerate(titles, 1)]
    assert counted == [70] * len(titles)


def test_a_setting_that_no_run_would_take_is_refused_before_anything_is_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"training\.steps is 'many'"):
        trained(monkeypatch, tmp_path / "demo", "--set", "training.steps=many")
    assert not (tmp_path / "demo").exists()
