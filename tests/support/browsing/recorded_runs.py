"""What training jobs have written, without the training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidecast.trainer.job.run_log import RunLog

DETAILS = {"version": 1, "base_step": 50, "staleness_steps": 2, "horizon_intervals": 1, "weight": 0.9}


def write_recorded_run(
    run_dir: Path,
    *,
    gain: float = 0.25,
    schedule: str = "constant",
    nowcaster: Mapping[str, Any] | None = None,
    changes: Mapping[str, object] | None = None,
    is_validated: bool = True,
    is_over: bool = True,
) -> Path:
    """Writes the metrics of a run of 200 steps, whose loss falls with the logarithm of the step.

    Args:
        run_dir: Of the run.
        gain: How fast.
        schedule: Of its learning rate.
        nowcaster: Its settings; None for a run without nowcasts.
        changes: Of the record of its settings, by dotted path.
        is_validated: Whether there are validations.
        is_over: Whether it has come to its end.
    """
    record: dict[str, Any] = {
        "kind": "run",
        "num_parameters": 1000,
        "num_ranks": 2,
        "num_train_tokens": 5000,
        "num_validation_tokens": 500,
        "machine": {"system": "s", "num_cores": 2},
        "versions": {"torch": "2"},
        "training": {
            "steps": 200,
            "seed": 0,
            "data": {"corpus": "c", "tokenizer": "t", "sequence_length": 128, "validation_sequences": 8},
            "schedule": {"kind": schedule, "warmup_steps": 10, "decay_steps": None, "min_ratio": 0.0},
        },
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.001, "betas": [0.9, 0.95]}},
            **({} if nowcaster is None else {"nowcaster": dict(nowcaster)}),
        },
    }
    for path, value in (changes or {}).items():
        *folders, name = path.split(".")
        place = record
        for folder in folders:
            place = place[folder]
        place[name] = value
    with RunLog(run_dir) as log:
        log(record)
        for step in range(10, 201, 10):
            loss, seconds = 4 - gain * math.log(step), step / 100
            log({"kind": "train", "step": step, "loss": loss, "training_s": seconds, "tokens_per_s": 1000.0 + step})
            if is_validated and step % 20 == 0:
                log({"kind": "validation", "step": step, "loss": loss, "training_s": seconds})
            if nowcaster is not None and step in (100, 150):
                log({"kind": "nowcast", "step": step, "event": "applied", "details": DETAILS})
        if is_over:
            ranks = [{"blocked_s": 0.5, "staging_s": 0.1, "bytes_uploaded": 1 << 20}]
            log({"kind": "summary", "training_s": 2.0, "nowcaster": None if nowcaster is None else ranks})
    return run_dir
