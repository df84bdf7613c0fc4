"""``sidecast report``: what a page about several runs says, and what it says against itself."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from sidecast.commands.__main__ import main
from sidecast.trainer.job.run_log import RunLog
from sidecast.trainer.report.command import read_runs
from sidecast.trainer.report.several import NamedRun, fairness, outcome, reference_of
from tests.support.browsing.recorded_runs import write_recorded_run


def read(*folders: Path) -> list[NamedRun]:
    return read_runs(folders)


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write_recorded_run(tmp_path / "plain")


@pytest.fixture
def pushed(tmp_path: Path) -> Path:
    return write_recorded_run(tmp_path / "pushed", gain=0.26, nowcaster={"policy": "push"})


def test_points_are_over_steps_tokens_and_seconds(plain: Path) -> None:
    (run,) = read(plain)
    # 4 sequences of 128 tokens on each of 2 ranks, twice.
    assert run.tokens_per_step == 4 * 128 * 2 * 2
    assert run.by_tokens([(10, 3.0)]) == ((20_480, 3.0),)
    assert run.by_time([(10, 3.0), (11, 2.9)]) == ((0.1, 3.0),)


def test_the_reference_is_the_first_run_without_nowcasts(plain: Path, pushed: Path) -> None:
    runs = read(pushed, plain)
    assert [run.has_nowcasts for run in runs] == [True, False]
    assert reference_of(runs).name == "plain"
    assert reference_of(runs[:1]).name == "pushed"


def test_equivalent_steps_are_read_from_the_reference(plain: Path, pushed: Path) -> None:
    reference, run = read(plain, pushed)
    found = outcome(run, reference)
    assert found.best_loss == pytest.approx(4 - 0.26 * math.log(200))
    assert (found.at_step, found.difference) == (200, pytest.approx(-0.01 * math.log(200)))
    # It never gets there.
    assert (found.equivalent_steps, found.why_not) == (None, "more than 200")
    back = outcome(reference, run)
    assert back.equivalent_steps is not None
    level = 4 - 0.25 * math.log(200)
    assert back.equivalent_steps == pytest.approx(math.exp((4 - level) / 0.26), rel=0.02)


def test_under_a_decay_steps_to_a_loss_are_not_compared(tmp_path: Path) -> None:
    runs = [
        write_recorded_run(tmp_path / name, gain=gain, schedule="cosine") for name, gain in (("a", 0.2), ("b", 0.3))
    ]
    reference, run = read(*runs)
    found = outcome(run, reference)
    assert (found.equivalent_steps, found.why_not) == (None, "a rate decays: only ends compare")
    assert found.difference is not None


def test_a_run_without_validations_is_not_held_against_one_with(tmp_path: Path, plain: Path) -> None:
    reference, run = read(plain, write_recorded_run(tmp_path / "blind", is_validated=False))
    found = outcome(run, reference)
    assert (found.difference, found.why_not) == (None, "only one of them was validated")


def test_runs_that_differ_in_nothing_but_nowcasts_are_fair(plain: Path, pushed: Path) -> None:
    reference, run = read(plain, pushed)
    found = fairness([reference, run], reference)
    assert found.is_fair
    assert found.times == ()
    # And yet.
    assert any("one seed is no statistic" in item for item in found.limits)
    assert any("a decay often gains more" in item for item in found.limits)


@pytest.mark.parametrize(
    ("path", "value", "kind", "words"),
    [
        ("deepspeed.optimizer.params.lr", 0.003, "causes", "the learning rate of other is 0.003, of plain 0.001"),
        ("deepspeed.optimizer.params.weight_decay", 0.1, "causes", "the optimizer of other is"),
        ("deepspeed.optimizer.type", "SGD", "causes", "the optimizer of other is"),
        ("training.schedule.kind", "cosine", "causes", "the schedule of the learning rate of other is kind cosine"),
        ("training.schedule.warmup_steps", 9, "causes", "the schedule of the learning rate of other"),
        ("training.steps", 999, "causes", "the length in steps of other is 999, of plain 200"),
        ("training.model", {"hidden_size": 96}, "causes", "the model of other is"),
        ("start_step", 500, "causes", "the step that it began at of other is 500"),
        ("deepspeed.bf16", {"enabled": True}, "causes", "the precision (bf16) of other is"),
        ("training.seed", 5, "causes", "the seed of other is 5, of plain 0"),
        ("num_ranks", 4, "causes", "other trains on 4,096 tokens a step, plain on 2,048"),
        ("training.data.corpus", "another", "losses", "the corpus of other is another, of plain c"),
        ("training.data.sequence_length", 64, "losses", "the sequence length of other is 64, of plain 128"),
        ("num_parameters", 2, "losses", "the number of parameters of other is 2, of plain 1,000"),
        ("training.data.validation_sequences", 3, "losses", "the number of sequences that are validated on"),
        ("machine.num_cores", 99, "times", "the machine of other is"),
    ],
)
def test_what_else_differs_is_named(
    tmp_path: Path, plain: Path, path: str, value: object, kind: str, words: str
) -> None:
    reference, run = read(plain, write_recorded_run(tmp_path / "other", changes={path: value}))
    found = fairness([reference, run], reference)
    assert any(words in item for item in getattr(found, kind)), found
    assert found.is_fair is (kind == "times")


def test_a_learning_rate_that_differs_is_told_once(tmp_path: Path, plain: Path) -> None:
    changes = {"deepspeed.optimizer.params.lr": 0.003}
    reference, run = read(plain, write_recorded_run(tmp_path / "other", changes=changes))
    assert len(fairness([reference, run], reference).causes) == 1


def test_a_run_that_is_not_over_and_one_that_does_not_say_what_it_is(tmp_path: Path, plain: Path) -> None:
    reference, young = read(plain, write_recorded_run(tmp_path / "young", is_over=False))
    assert fairness([reference, young], reference).causes == ("young is not over: its last step so far is 200",)
    with RunLog(tmp_path / "bare") as log:
        log({"kind": "train", "step": 10, "loss": 1.0, "training_s": 1.0})
    reference, bare = read(plain, tmp_path / "bare")
    assert "bare does not say what it trained" in fairness([reference, bare], reference).losses[0]
    assert bare.by_tokens(bare.losses) == ()


# --- the page


def page(tmp_path: Path, *arguments: object) -> str:
    out = tmp_path / "out.html"
    assert main(["report", *map(str, arguments), "--out", str(out)]) == 0
    return out.read_text()


def test_a_page_holds_all_that_it_needs(
    tmp_path: Path, plain: Path, pushed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = page(tmp_path, plain, pushed)
    said = capsys.readouterr().out
    assert said.startswith("A fair comparison with plain, as far as the records tell: nothing but nowcasts differs.\n")
    assert "A fair comparison with plain" in text
    assert text.count("<svg") == 3
    for axis in ("step", "tokens", "seconds"):
        assert f'aria-label="loss by {axis}"' in text
    assert re.findall(r"(?:src|href)=\"(?!data:)", text) == []
    assert "<script" not in text
    assert "0.50 s (25.00%)" in text
    assert "pushes: 2 applied, 0 rejected, 0 dropped" in text
    assert "more than 200" in text


def test_an_unfair_comparison_is_said_to_be_one_first_of_all(
    tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_recorded_run(tmp_path / "other", changes={"deepspeed.optimizer.params.lr": 0.003})
    text = page(tmp_path, plain, other)
    assert 'class="verdict lost"><p>Not a fair comparison with plain' in text
    assert "the learning rate of other is 0.003, of plain 0.001" in text
    assert "the learning rate of other is 0.003" in capsys.readouterr().out


def test_names_are_text(tmp_path: Path, plain: Path) -> None:
    text = page(tmp_path, plain, write_recorded_run(tmp_path / "<b>&amp;"))
    assert "<b>&amp;" not in text
    assert "&lt;b&gt;&amp;amp;" in text


def test_read_outs_are_drawn_where_they_were_written_down(tmp_path: Path, plain: Path) -> None:
    with (plain / "metrics.jsonl").open("a") as file:
        for step in (100, 50):
            file.write(f'{{"kind": "read_out", "name": "ema5", "step": {step}, "loss": {3 - step / 100}}}\n')
    text = page(tmp_path, plain)
    assert "<h2>Read-outs</h2>" in text
    assert "plain, ema5, step 50: 2.5000" in text
    assert "One run, plain, with nothing to compare it with." in text


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    folders = [write_recorded_run(tmp_path / sweep / "run") for sweep in ("a", "b")]
    assert [run.name for run in read(*folders)] == ["a/run", "b/run"]
    assert [run.name for run in read(folders[0] / "metrics.jsonl")] == ["run"]


def test_a_baseline_may_be_named(tmp_path: Path, plain: Path, pushed: Path) -> None:
    assert "A fair comparison with pushed" in page(tmp_path, plain, pushed, "--baseline", pushed)


def test_what_is_no_run_is_named(tmp_path: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").write_text("[]\n")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "metrics.jsonl").write_text("")
    for arguments, words in (
        ([tmp_path / "empty"], "empty cannot be read: metrics.jsonl: "),
        ([tmp_path / "broken"], "broken cannot be read: metrics.jsonl: it is not what a training job writes"),
        ([tmp_path / "young"], "young has no training steps yet"),
        ([plain, plain], "allowed: each of them once"),
        ([plain, "--baseline", tmp_path / "empty"], "--baseline is "),
        ([plain, "--out", tmp_path / "nowhere" / "page.html"], "page.html cannot be written: "),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert words in said
        assert said.count("\n") == 1


def test_more_runs_than_colours_are_dashed(tmp_path: Path) -> None:
    folders = [write_recorded_run(tmp_path / f"run{number}") for number in range(9)]
    assert 'class="run0 dashed"' in page(tmp_path, *folders)
