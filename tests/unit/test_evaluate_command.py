"""``sidecast evaluate``: a small farm from the command line, what is kept of it, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecast.commands.__main__ import main
from sidecast.evaluation import corpora, read_outs, running
from sidecast.evaluation.gradients import Engine
from sidecast.evaluation.grid import ARMS, Grid, groups, parse_arm
from sidecast.evaluation.read_outs import HALF_LIVES
from sidecast.evaluation.results import ResultStore
from sidecast.evaluation.running import Workers, open_jobs, run_jobs
from sidecast.evaluation.schedules import Schedule
from sidecast.evaluation.tasks import TASKS
from tests.support import farm_runs
from tests.support.farm_runs import one_thread

SHORT = ["--steps", "12", "--warmup", "2", "--seeds", "2", "--lr", "0.01"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(autouse=True)
def _made_up_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "load_corpus", lambda name, cache: farm_runs.corpus())
    running._corpus.cache_clear()


def test_a_farm_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--preset", "smoke", *SHORT, "--out", str(tmp_path)]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "4 runs to do, 48 steps" in shown.err
    assert "100.0 %" in shown.err
    assert "| push:start_step=20 | 0.01, 0.9 |" in shown.out
    assert (tmp_path / "report.html").read_text().startswith("<!doctype html>")
    before = (tmp_path / "results.jsonl").read_text()
    assert main(command) == 0
    assert "0 runs to do" in capsys.readouterr().err
    assert (tmp_path / "results.jsonl").read_text() == before
    # More seeds add to what is there.
    assert main([*command, "--seeds", "3"]) == 0
    assert "2 runs to do" in capsys.readouterr().err
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("begun_with", [HALF_LIVES, {"ema3": 0.03}])
def test_what_was_interrupted_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun_with: dict[str, float]
) -> None:
    monkeypatch.setattr(running, "SLICE_STEPS", 5)
    monkeypatch.setattr(running, "STATE_INTERVAL_STEPS", 5)
    grid = Grid(
        tasks=["smoke"],
        arms=[ARMS["adamw"], parse_arm("push:start_step=2,interval_steps=2")],
        schedules=[Schedule(warmup_steps=2)],
        lrs=[0.01],
        b1s=[0.9],
        lengths=[12],
        num_seeds=1,
    )
    workers = Workers(engine=Engine())
    whole, broken = ResultStore(tmp_path / "whole"), ResultStore(tmp_path / "broken")
    run_jobs(open_jobs(grid.members(), whole, workers), whole, workers, lambda num_steps: None)
    taken: list[int] = []

    def stop(num_steps: int) -> None:
        taken.append(num_steps)
        if len(taken) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as earlier:
        earlier.setattr(read_outs, "HALF_LIVES", begun_with)
        with pytest.raises(KeyboardInterrupt):
            run_jobs(open_jobs(grid.members(), broken, workers), broken, workers, stop)
    assert broken.read() == {}
    steps: list[int] = []
    run_jobs(open_jobs(grid.members(), broken, workers), broken, workers, steps.append)
    # What an older version began with other read-outs begins anew.
    assert steps == ([20, 4] if begun_with is HALF_LIVES else [10, 10, 4])
    expected = {key: member.result.final_losses for key, member in whole.read().items()}
    assert {key: member.result.final_losses for key, member in broken.read().items()} == expected
    assert list((broken.folder / "unfinished").iterdir()) == []


def test_a_line_that_was_cut_short_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", "--preset", "smoke", *SHORT, "--out", str(tmp_path)]
    assert main(command) == 0
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text()[:-40])
    capsys.readouterr()
    assert main(command) == 0
    assert "1 runs to do" in capsys.readouterr().err


def test_members_of_a_group_share_task_seed_length_schedule_and_optimizer() -> None:
    grid = Grid(
        tasks=["smoke"],
        arms=[ARMS["adamw"], ARMS["push"], ARMS["muon"]],
        schedules=[Schedule(), Schedule(kind="wsd")],
        lrs=[0.01, 0.02],
        b1s=[0.8, 0.9],
        lengths=[200],
        baseline_lengths=[220],
        num_seeds=2,
    )
    members = grid.members()
    assert len(members) == 2 * 2 * (3 * 4 + 4)
    sizes = [len(group) for group in groups(members, 8)]
    assert sorted(sizes) == sorted([8, 4, 4] * 4)
    assert len({member.key("") for member in members}) == len(members)


def test_the_name_of_an_arm_is_no_part_of_a_results_name() -> None:
    options = {"task": "smoke", "seed": 0, "num_steps": 200}
    first, second = (farm_runs.MemberSettings(arm=arm, **options) for arm in ("adamw", "other"))
    assert first.key("a") == second.key("a") != first.key("b")
    assert farm_runs.MemberSettings.from_json(first.to_json()) == first


def test_the_texts_of_this_machine(tmp_path: Path) -> None:
    text = corpora.load_corpus("python-source", tmp_path)
    assert len(text.train_tokens) > 8 * len(text.validation_tokens) > 0
    again = corpora.load_corpus("python-source", tmp_path)
    assert (again.digest, again.origin) == (text.digest, text.origin)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "pyhton"], "task is 'pyhton'; allowed: python-bytes, "),
        (["--methods", "pusch"], "method is 'pusch'; allowed: adamw, push, "),
        (["--methods", "push:gain"], "NAME:OPTION=VALUE,... is needed, and 'gain' is no OPTION=VALUE"),
        (["--methods", "push:gian=2"], "method 'push' has no option 'gian'; allowed: interval_steps, "),
        (["--methods", "adamw:gain=2"], "optimizer 'adamw' has no option 'gain'; allowed: none"),
        (["--schedule", "cosinus"], "schedule is 'cosinus'; allowed: constant, cosine, wsd"),
        (["--lr", "-1"], "lr is -1.0; it must be above 0"),
        (["--b1", "1"], "b1 is 1.0; it must be at least 0 and below 1"),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--steps", "5"], "warmup_steps is 10; it must be at most the length of the run, 5 steps"),
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--report-only"], "which has no results; train some without --report-only"),
    ],
)
def test_refusals_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--preset", "smoke", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("sidecast: ")
    assert message in error


def test_the_page_names_every_method_and_task() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "evaluate.md").read_text()
    assert [name for name in [*ARMS, *TASKS] if f"`{name}`" not in page] == []
