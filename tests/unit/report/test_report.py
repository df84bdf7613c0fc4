from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from sidecast.errors import ConfigError
from sidecast.trainer.job.run_log import RunLog
from sidecast.trainer.report.__main__ import write_report
from sidecast.trainer.report.charts import Curve, svg_chart, ticks

DETAILS = {
    "version": 1,
    "base_step": 50,
    "staleness_steps": 2,
    "horizon_intervals": 5,
    "weight": 0.96,
    "relative_norm": 0.01,
    "digest": "00ff",
}


def run_record(schedule: str, **nowcaster: str) -> dict[str, Any]:
    return {
        "kind": "run",
        "num_parameters": 1,
        "num_ranks": 1,
        "num_train_tokens": 1,
        "num_validation_tokens": 1,
        "machine": {"system": "s", "num_cores": 1},
        "versions": {},
        "training": {
            "data": {"corpus": "c", "tokenizer": "t", "sequence_length": 8},
            "schedule": {"kind": schedule, "warmup_steps": 1},
            "seed": 0,
        },
        "deepspeed": {"train_micro_batch_size_per_gpu": 1, "optimizer": {}, "nowcaster": nowcaster},
    }


def write_run(run_dir: Path, gain: float) -> Path:
    with RunLog(run_dir) as log:
        for step in range(10, 201, 10):
            loss = 3.0 - gain * math.log(step)
            log({"kind": "train", "step": step, "loss": loss, "training_s": step / 100})
            if step % 50 == 0:
                log({"kind": "validation", "step": step, "loss": loss})
            if gain > 0.2 and step == 50:
                log({"kind": "nowcast", "step": 52, "event": "applied", "details": DETAILS})
                log({"kind": "nowcast", "step": 90, "event": "accepted", "details": {"version": 1, "reason": "<b>"}})
        ranks = [{"blocked_s": 0.01, "staging_s": 0.004, "bytes_uploaded": 2**20, "nowcast_s": [0.25]}]
        log({"kind": "summary", "training_s": 2.0, "nowcaster": ranks if gain > 0.2 else None})
    return run_dir


def write_pushed_run(run_dir: Path, *, is_suspended: bool = False) -> Path:
    with RunLog(run_dir) as log:
        log(run_record("cosine", policy="push"))
        for step in range(10, 201, 10):
            log({"kind": "train", "step": step, "loss": 3.0 - step / 100, "training_s": step / 100})
            log({"kind": "validation", "step": step, "loss": 3.0 - step / 100})
            details = {**DETAILS, "weight": 0.5 if step == 200 else 1.0, "staleness_steps": step // 20}
            log({"kind": "nowcast", "step": step, "event": "applied", "details": details})
        if is_suspended:
            log({"kind": "nowcast", "step": 150, "event": "suspended", "details": {"reason": "the loss rose"}})
        log({"kind": "summary", "training_s": 2.0, "nowcaster": [{}]})
    return run_dir


def test_pushes_are_counted_and_not_shown_one_by_one(tmp_path: Path) -> None:
    text = write_report(write_pushed_run(tmp_path / "a"), None, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert re.search(r"^pushes +20 applied, 0 rejected, 0 dropped$", text, re.MULTILINE)
    assert "jump" not in re.sub(r"<style>.*</style>", "", page, flags=re.DOTALL)
    assert "<td>20, from step 10 to 200</td>" in page
    assert "<td>5 in the median, 10 at most</td>" in page
    assert "<th>ended by the guard</th><td>no</td>" in page


def test_a_guard_that_ended_the_pushes_is_shown_with_its_reason(tmp_path: Path) -> None:
    write_report(write_pushed_run(tmp_path / "a", is_suspended=True), None, tmp_path / "out")
    assert "<td>yes, at step 150: the loss rose</td>" in (tmp_path / "out" / "report.html").read_text()


def test_runs_beside_are_shown_and_judge_nothing(tmp_path: Path) -> None:
    beside = write_run(tmp_path / "constant_rate", 0.5)
    runs = [write_pushed_run(tmp_path / name) for name in ("a", "b")]
    text = write_report(runs[0], runs[1], tmp_path / "out", [beside])
    assert "no different from that of the run without nowcasts under the same cosine decay (1.0000)" in text
    assert re.search(r"^best validation loss, constant rate +0\.3508 at step 200$", text, re.MULTILINE)
    assert "constant rate, validation, step 200: 0.3508" in (tmp_path / "out" / "report.html").read_text()


def test_a_report_stands_alone_and_shows_jumps_cost_and_verdict(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "a", 0.3), write_run(tmp_path / "b", 0.2), tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert "steps saved against the run without nowcasts" in text
    assert "steps saved against the run without nowcasts" in page
    assert "0.500% of its training time" in page
    assert "nowcast 1 applied at step 52" in page
    assert "accepted" in page
    assert not re.search(r"(?:src|href)\s*=|https?://|@import|\$\w", page)
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("rollback", "outcome"), [("host", "on probation at the end"), ("off", "not judged")])
def test_a_jump_without_a_verdict_is_not_said_to_be_on_probation_where_none_is(
    tmp_path: Path, rollback: str, outcome: str
) -> None:
    with RunLog(tmp_path / "run") as log:
        log(run_record("constant", rollback=rollback))
        for step in (10, 20):
            log({"kind": "train", "step": step, "loss": 3.0 - step / 100, "training_s": 1.0})
        log({"kind": "nowcast", "step": 12, "event": "applied", "details": DETAILS})
    write_report(tmp_path / "run", None, tmp_path / "out")
    assert f"<td>{outcome}</td>" in (tmp_path / "out" / "report.html").read_text()


def test_a_run_can_be_reported_alone(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "b", 0.2), None, tmp_path / "out")
    assert "nothing to compare it with" in text


def test_a_run_that_diverged_is_still_reported(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run") as log:
        for step in (10, 20, 30):
            loss = 3.0 if step == 10 else math.nan
            log({"kind": "train", "step": step, "loss": loss, "training_s": 1.0})
    write_report(tmp_path / "run", None, tmp_path / "out")
    assert "Nothing was measured from step 15 on" in (tmp_path / "out" / "report.html").read_text()


def test_a_directory_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.*metrics\.jsonl"):
        write_report(tmp_path / "nowhere", None, tmp_path / "out")


def test_charts_are_well_formed_and_stay_inside(tmp_path: Path) -> None:
    curve = Curve(name="a<b", points=[(0, 9.0), (100, 2.0), (200, 1.0)], style="nowcast", dotted=True)
    chart = ElementTree.fromstring(svg_chart([curve], [10, 150], from_step=50))
    assert len(chart.findall("circle")) == 2
    assert len(chart.findall("g")) == 1
    assert all(0 <= float(dot.attrib["cy"]) <= 400 for dot in chart.findall("circle"))


def test_ticks_are_round_numbers_within_the_ends() -> None:
    assert list(ticks(0, 1000)) == [0, 200, 400, 600, 800, 1000]
    assert list(ticks(1.01, 1.09)) == pytest.approx([1.02, 1.04, 1.06, 1.08])
