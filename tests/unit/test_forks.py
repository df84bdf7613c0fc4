"""Decays that are forked from a run, its read-outs, and which share of the decay's gain these have."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sidecast.commands import evaluate_forks
from sidecast.commands.__main__ import main
from sidecast.errors import ConfigError
from sidecast.evaluation.batches import probe_batches, validation_batches
from sidecast.evaluation.farm import GroupRun
from sidecast.evaluation.forks.analysis import by_setting, judge, table
from sidecast.evaluation.forks.results import ForkResult, add_fork, read_forks
from sidecast.evaluation.forks.run import Average, ForkedRun
from sidecast.evaluation.forks.settings import ForkSettings
from sidecast.evaluation.gradients import AutogradGradients, Engine, mean_losses
from sidecast.evaluation.schedules import Schedule
from sidecast.policies.read_outs import read_out_of
from tests.support.farm_runs import TASK, corpus, member, one_thread


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


SETTINGS = ForkSettings(member=member(num_steps=40, schedule="constant"), fractions=(0.3,))
LENGTHS = (TASK.num_validation_sequences, TASK.batch_size, TASK.sequence_length)


@pytest.fixture(scope="module")
def losses() -> dict[int, dict[str, tuple[float, float]]]:
    return ForkedRun(TASK, [corpus()], SETTINGS, Engine()).losses()


def whole(schedule: Schedule, num_steps: int) -> GroupRun:
    """The same run, planned from the beginning."""
    settings = replace(SETTINGS.member, schedule=schedule, num_steps=num_steps)
    run = GroupRun(TASK, [corpus()], [settings], Engine())
    run.advance(num_steps)
    return run


@pytest.mark.parametrize(("shape", "kind"), [("linear", "wsd"), ("1-sqrt", "wsd-sqrt")])
@pytest.mark.parametrize("step", [10, 30])
def test_a_forked_decay_is_the_end_of_a_run_that_was_planned_with_it(
    losses: dict[int, dict[str, tuple[float, float]]], shape: str, kind: str, step: int
) -> None:
    schedule = Schedule(kind=kind, warmup_steps=5, decay_fraction=0.3, min_ratio=0.0)
    planned = whole(schedule, step).results()[0].final_losses["raw"]
    assert losses[step][f"{shape} 30 %"][1] == planned
    assert losses[step]["raw"][1] == whole(SETTINGS.member.schedule, step).results()[0].final_losses["raw"] != planned


def test_read_outs_are_those_of_the_service(losses: dict[int, dict[str, tuple[float, float]]]) -> None:
    assert list(losses) == [10, 20, 30, 40]
    run = GroupRun(TASK, [corpus()], [SETTINGS.member], Engine())
    states = {}
    for step in (10, 20, 30, 40):
        run.advance(step - run.step)
        states[step] = run.params_MP.double().clone()
    # States 30 and 40; wsm@60%: from step 20 on, half of the way has the weight sqrt(1/2).
    early = math.sqrt(0.5)
    expected = (early * states[30] + (1 - early) * states[40]).float()
    text = validation_batches(corpus().validation_tokens, *LENGTHS)
    found = mean_losses(AutogradGradients(TASK.model.build(), Engine()), expected, text)[0]
    assert losses[40]["wsm@60%"][1] == pytest.approx(found, abs=1e-6)
    # With one state of ten steps all of them are that state.
    assert losses[10]["ema5"] == losses[10]["raw"] == losses[10]["wsm@60%"]
    average = Average(read_out_of("ema20"))
    before = 0
    mixed = torch.zeros_like(states[10])
    for step, state in states.items():
        average.fold(step, state.float())
        mixed += read_out_of("ema20").share(0, before, step) * (state - mixed)
        before = step
    assert average.values_MP is not None
    torch.testing.assert_close(average.values_MP.double(), mixed, rtol=0, atol=1e-6)


def test_the_probe_has_no_token_of_the_text_that_judges() -> None:
    tokens = torch.arange(5000) % 251
    text = torch.arange(5000)
    positions = [
        {int(each) for batch in make(text, *LENGTHS) for part in batch for each in part.flatten()}
        for make in (validation_batches, probe_batches)
    ]
    assert positions[0].isdisjoint(positions[1])
    assert len(probe_batches(tokens, *LENGTHS)) == len(validation_batches(tokens, *LENGTHS))
    with pytest.raises(ConfigError, match="the held-out text has 400 tokens; a probe beside 16 sequences of 16 tokens"):
        probe_batches(tokens[:400], *LENGTHS)


def test_a_fall_by_the_root_is_steepest_at_its_beginning() -> None:
    schedule = Schedule(kind="wsd-sqrt", warmup_steps=0, decay_fraction=0.25, min_ratio=0.0)
    ratios = [schedule.ratio(step, 16) for step in (0, 12, 13, 15)]
    assert ratios == [1.0, 1.0, 0.5, pytest.approx(1 - math.sqrt(0.75))]


def test_decays_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="a decay over 60 % of 10 steps begins after 4; allowed: after the warm-up"):
        ForkSettings(member=SETTINGS.member, fractions=(0.6,))
    with pytest.raises(ConfigError, match=r"decay_fraction is 0\.0; it must be above 0"):
        ForkSettings(member=SETTINGS.member, fractions=(0.0,))


def result(seed: int, lr: float, losses: dict[str, tuple[float, float]]) -> ForkResult:
    settings = ForkSettings(member=member(seed=seed, lr=lr, num_steps=40, schedule="constant"), fractions=(0.3,))
    return ForkResult(key=f"{seed} {lr}", settings=settings, losses={40: losses}, conditions={})


def made_up() -> list[ForkResult]:
    """Two seeds and two rates. In seed 0 the lower rate and the other decay would look best, by luck."""
    rows = []
    for seed in (0, 1):
        luck = 0.5 if seed == 0 else 0.0
        rows.append(
            result(
                seed,
                1e-3,
                {"raw": (2.0, 2.0), "ema5": (1.0, 1.9), "linear 30 %": (9.0, 1.5 - luck), "1-sqrt 30 %": (0.0, 1.6)},
            )
        )
        named = {"raw": (2.0, 2.0), "ema2": (1.2, 1.0), "ema5": (1.1, 1.2 + luck / 10), "wsm@60%": (1.0, 1.1)}
        decays = {"linear 30 %": (0.0, 1.3), "1-sqrt 30 %": (9.0, 1.0)}
        rows.append(result(seed, 2e-3, {**named, **decays}))
    return rows


def test_the_decay_is_tuned_by_the_other_seeds_and_the_read_out_chosen_by_the_probe() -> None:
    ((_, steps),) = by_setting(made_up()).items()
    judged = judge(steps[40])
    for seed in (0, 1):
        found = judged[seed]
        if seed == 0:
            assert (found.point, found.decay, found.decay_loss) == ((2e-3, 0.9), "1-sqrt 30 %", 1.0)
            # Not ema2, which is better where nobody looks.
            assert found.chosen == {"any time": "ema5", "known step": "wsm@60%"}
            assert found.share("any time") == pytest.approx((2.0 - 1.25) / (2.0 - 1.0))
            assert found.share("known step") == pytest.approx(0.9)
        else:
            # By seed 0 alone, whose luck is in two of its rates' decays.
            assert found.decay == "1-sqrt 30 %" or found.point == (1e-3, 0.9)
    text = table(next(iter(by_setting(made_up()))), steps)
    assert "| 40 | 2.0000 | " in text
    assert "| mean | | | " in text


def test_runs_that_differ_in_more_than_rates_and_seeds_are_never_in_one_table() -> None:
    rows = made_up()
    member = replace(rows[0].settings.member, optimizer=replace(rows[0].settings.member.optimizer, weight_decay=0.5))
    others = [
        ForkSettings(member=member, fractions=(0.3,)),
        ForkSettings(member=rows[0].settings.member, fractions=(0.2,)),
    ]
    losses = {40: {"raw": (9.0, 9.0), "ema5": (9.0, 9.0), "linear 20 %": (9.0, 9.0), "linear 30 %": (9.0, 9.0)}}
    rows += [ForkResult(key=str(other), settings=other, losses=losses, conditions={}) for other in others]
    found = by_setting(rows)
    assert len(found) == 3
    first = next(iter(found))
    assert found[first] == next(iter(by_setting(made_up()).values()))
    assert "fewer than two seeds" in table(*list(found.items())[1])


@pytest.mark.parametrize(("raw", "decayed"), [(math.inf, math.inf), (2.0, math.inf), (2.0, 2.0)])
def test_a_decay_that_gains_nothing_has_no_share(raw: float, decayed: float) -> None:
    rows = [result(seed, 1e-3, {"raw": (2.0, 2.0), "ema5": (1.0, 1.5), "linear 30 %": (0.0, 1.0)}) for seed in (0, 1)]
    rows.append(result(2, 1e-3, {"raw": (raw, raw), "ema5": (1.0, 1.5), "linear 30 %": (0.0, decayed)}))
    text = table(*next(iter(by_setting(rows).items())))
    assert "Left out, as their decay gains nothing: 1." in text
    assert "50 % [50, 50]" in text
    assert "nan" not in text


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    first = result(0, 1e-3, {"raw": (1.5, math.inf)})
    add_fork(tmp_path, first)
    with (tmp_path / "forks.jsonl").open("a") as file:
        file.write('{"key": "cut')
    assert read_forks(tmp_path) == {first.key: first}
    second = result(1, 1e-3, {"raw": (1.5, 1.25)})
    add_fork(tmp_path, second)
    assert list(read_forks(tmp_path).values()) == [first, second]
    (tmp_path / "forks.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="line 1 is no result of this version"):
        read_forks(tmp_path)


def test_the_command_goes_on_and_refuses_what_forks_do_not_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiling takes longer than the runs.
    monkeypatch.setattr(evaluate_forks, "compiled_gradients", lambda *_: None)
    command = ["evaluate", "--forks", "--out", str(tmp_path), "--lr", "8e-3", "--steps", "40", "--warmup", "2"]
    command += ["--decays", "0.3"]
    assert main([*command, "--seeds", "1"]) == 0
    said = capsys.readouterr()
    assert "1 runs with forks to do, 100 steps" in said.err
    assert "fewer than two seeds that all rates have" in said.out
    assert main([*command, "--seeds", "2"]) == 0
    assert "1 runs with forks to do, 100 steps" in capsys.readouterr().err
    lines = (tmp_path / "forks.jsonl").read_text().splitlines()
    assert [json.loads(line)["settings"]["member"]["seed"] for line in lines] == [0, 1]
    assert "fewer than two seeds" not in (tmp_path / "forks.md").read_text()
    assert main([*command, "--methods", "push"]) == 2
    assert "--forks is of plain AdamW at a constant rate" in capsys.readouterr().err
    assert main(["evaluate", "--out", str(tmp_path), "--decays", "0.1"]) == 2
    assert "--decays goes with --forks, which is missing" in capsys.readouterr().err


def test_probe_pieces_are_of_the_text() -> None:
    tokens = torch.from_numpy(np.arange(4000, dtype=np.int64))
    for inputs, targets in probe_batches(tokens, *LENGTHS):
        assert torch.equal(inputs + 1, targets)
