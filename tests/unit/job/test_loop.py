"""What the training loop says about its speed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sidecast.trainer.job import loop as loop_module
from sidecast.trainer.job.config import TrainingConfig
from sidecast.trainer.job.loop import TrainingLoop

STEP_S, VALIDATION_S = 1.0, 100.0


def test_validations_inside_an_interval_neither_slow_nor_quicken_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now_s = 0.0

    def take(seconds: float, result: Any) -> Any:
        nonlocal now_s
        now_s += seconds
        return result

    monkeypatch.setattr(loop_module.time, "perf_counter", lambda: now_s)
    monkeypatch.setattr(TrainingLoop, "_train_step", lambda self, step: take(STEP_S, torch.ones(())))
    monkeypatch.setattr(TrainingLoop, "_validate", lambda self, step: take(VALIDATION_S, {"kind": "validation"}))
    monkeypatch.setattr(TrainingLoop, "_mean_over_ranks", lambda self, value: float(value))
    engine = SimpleNamespace(device="cpu", get_lr=lambda: [0.1], get_global_grad_norm=lambda: None)
    order = SimpleNamespace(world_size=1, micro_batch_size=2, num_micro_batches=1, sequence_length=8)
    config = TrainingConfig(run_dir=str(tmp_path), steps=20, log_interval_steps=10, validation_interval_steps=4)
    records: list[Any] = []
    loop = TrainingLoop(engine, config, order, {}, [records.append])  # type: ignore[arg-type]
    loop.run(0)
    assert [record["tokens_per_s"] for record in records if record["kind"] == "train"] == [16.0, 16.0]
    assert loop.training_s == 20 * STEP_S
