from __future__ import annotations

import io
from typing import Any

from sidecast.trainer.job.progress import ProgressBar, describe


def test_a_bar_shows_loss_speed_and_rate_and_starts_where_the_run_does() -> None:
    stream = io.StringIO()
    bar = ProgressBar("training", 100, stream)
    bar({"kind": "train", "step": 5, "loss": 1.0, "tokens_per_s": 1.0, "lr": 0.1})
    assert stream.getvalue() == ""
    bar({"kind": "run", "start_step": 40})
    bar({"kind": "train", "step": 50, "loss": 1.25, "tokens_per_s": 4321.0, "lr": 0.002})
    bar.close()
    last = stream.getvalue().rsplit("\r", 1)[-1]
    assert "50/100" in last
    assert "loss 1.2500, 4,321 tokens/s, lr 2.00e-03" in last


def test_pushes_are_no_lines_as_there_are_hundreds() -> None:
    applied: dict[str, Any] = {"weight": 1.0, "horizon_intervals": 1, "staleness_steps": 2, "version": 1}
    record = {"kind": "nowcast", "step": 202, "event": "applied", "details": applied}
    for policy, is_shown in (("push", False), ("jump", True)):
        stream = io.StringIO()
        bar = ProgressBar("training", 300, stream)
        bar({"kind": "run", "start_step": 0, "deepspeed": {"nowcaster": {"policy": policy}}})
        bar(record)
        bar({**record, "event": "suspended", "details": {"reason": "the loss rose"}})
        bar.close()
        assert ("applied" in stream.getvalue()) == is_shown
        assert "nowcast suspended: the loss rose" in stream.getvalue()


def test_events_are_lines() -> None:
    applied: dict[str, Any] = {"weight": 0.967, "horizon_intervals": 3, "staleness_steps": 2, "version": 1}
    record = {"kind": "nowcast", "step": 202, "event": "applied", "details": applied}
    assert describe(record) == "step 202: nowcast applied with weight 0.97: 3 snapshot intervals ahead, 2 steps old"
    record = {"kind": "nowcast", "step": 9, "event": "rolled_back", "details": {"reason": "worse"}}
    assert describe(record) == "step 9: nowcast rolled back: worse"
    record = {"kind": "validation", "step": 9, "loss": 1.0, "perplexity": 2.71828}
    assert describe(record) == "step 9: validation loss 1.0000, perplexity 2.718"
