"""The Hugging Face callback: harmless while nothing is applied, and resumed bit for bit, with DeepSpeed and without."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from sidecast import NowcastCallback
from sidecast.nowcaster_service.nowcasting import NowcastAnswer
from sidecast.trainer.integrations.state_files import STATE_FILE, load_state
from tests.integration.workers.huggingface_runs import (
    NUM_STEPS,
    PERIOD_STEPS,
    SAVE_STEP,
    section,
    straight_and_resumed,
    train,
)
from tests.support.scripts import alone, run_script
from tests.support.services.harness import RunningService

RUNS = Path(__file__).with_name("workers") / "huggingface_runs.py"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("service")) as running:
        yield running


def steps_of(result: dict[str, Any], kind: str) -> list[int]:
    return [step for event, step in result["events"] if event == kind]


def assert_resumed(straight: dict[str, Any], resumed: dict[str, Any]) -> None:
    assert steps_of(straight, "applied") == [PERIOD_STEPS, 2 * PERIOD_STEPS]
    assert steps_of(resumed, "applied") == [2 * PERIOD_STEPS]
    for kind in ("accepted", "rolled_back"):
        assert steps_of(resumed, kind) == [step for step in steps_of(straight, kind) if step > SAVE_STEP]
    assert steps_of(straight, "accepted") + steps_of(straight, "rolled_back") != []
    assert resumed["losses"] == straight["losses"]
    assert resumed["weights"] == straight["weights"]


def test_nothing_applied_changes_nothing(service: RunningService, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", None)
    # The service has no prediction for it: snapshots go out, and refusals come back.
    service.engines.answer = NowcastAnswer(refusal="not today")
    try:
        nowcasted = train(tmp_path / "nowcasted", section(service.endpoint))
    finally:
        service.engines.answer = None
    assert len(steps_of(nowcasted, "staged")) == 11
    assert steps_of(nowcasted, "failed") == [PERIOD_STEPS, 2 * PERIOD_STEPS]
    assert nowcasted["losses"] == plain["losses"]
    assert nowcasted["weights"] == plain["weights"]


def test_a_resumed_run_equals_the_uninterrupted_one(service: RunningService, tmp_path: Path) -> None:
    assert_resumed(*straight_and_resumed(tmp_path, service.endpoint, None))


class Hiding(Trainer):
    """Begins its backward passes by itself."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss: torch.Tensor = self.compute_loss(model.train(), inputs)
        loss.backward()
        return loss.detach()


def test_without_losses_no_jump_is_made_and_one_warning_says_so(
    service: RunningService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowcasted = train(tmp_path, section(service.endpoint), trainer_class=Hiding)
    assert len(nowcasted["losses"]) == NUM_STEPS
    assert steps_of(nowcasted, "applied") == []
    assert caplog.text.count("no jump is applied as long as too few losses are seen") == 1


def test_a_resumed_deepspeed_run_equals_the_uninterrupted_one(service: RunningService, tmp_path: Path) -> None:
    run_script(RUNS, tmp_path, service.endpoint, environment=alone())
    assert_resumed(*json.loads((tmp_path / "results.json").read_text()))


class FakeTrainer:
    """What the callback touches of a Trainer; each accelerator notes the losses whose backward pass it makes."""

    def __init__(self, folder: Path) -> None:
        self.args = SimpleNamespace(output_dir=str(folder), should_save=True)
        self.current_gradient_accumulation_steps = 2
        self.is_deepspeed_enabled = False
        self.num_passes = 0
        self.resumed_from: Any = None
        self.is_writing = True
        self.logged: list[dict[str, float]] = []
        self.create_accelerator_and_postprocess()

    def create_accelerator_and_postprocess(self) -> None:
        self.accelerator: Any = SimpleNamespace(prepare=None, backward=self._backward)

    def is_world_process_zero(self) -> bool:
        return self.is_writing

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.logged.append(logs)

    def _backward(self, loss: Any) -> None:
        self.num_passes += 1

    def train(self, resume_from_checkpoint: Any = None, trial: Any = None) -> None:
        self.resumed_from = resume_from_checkpoint
        if trial is not None:
            self.create_accelerator_and_postprocess()
        self.accelerator.backward(torch.ones(()))


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    return FakeTrainer(tmp_path)


@pytest.fixture
def seen() -> list[float]:
    return []


@pytest.fixture
def callback(trainer: Any, seen: list[float]) -> Any:
    """On that trainer, as if training had begun."""
    made: Any = NowcastCallback(trainer, {})
    made._attachment = SimpleNamespace(
        observe=lambda loss: seen.append(float(loss)),
        state_dict=lambda: {"step": 3},
        save_rollback_copy=lambda folder: None,
        hook=SimpleNamespace(summary=lambda: {"num_applied": 3, "nowcast_s": [0.5]}),
    )
    return made


def test_numbers_are_logged_with_losses_on_the_rank_that_writes(trainer: Any, callback: Any) -> None:
    rows = [{"loss": 0.5}, {"eval_loss": 0.5}, {"train_loss": 0.5}]
    for row in rows:
        trainer.log(dict(row), 0.0)
    trainer.is_writing = False
    trainer.log(dict(rows[0]))
    numbers = {"sidecast/num_applied": 3.0}
    assert trainer.logged == [rows[0] | numbers, rows[1], rows[2] | numbers, rows[0]]


@pytest.mark.parametrize("way", ["as it was", "assigned", "hyperparameter search"])
def test_losses_are_seen_by_whatever_accelerator_trains(
    way: str, trainer: Any, callback: Any, seen: list[float]
) -> None:
    if way == "assigned":
        trainer.accelerator = SimpleNamespace(prepare=None, backward=trainer._backward)
    for _ in range(2):
        trainer.train(trial={} if way == "hyperparameter search" else None)
    assert (seen, trainer.num_passes) == ([2.0, 2.0], 2)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_checkpoint_is_found_by_whatever_names_it(kind: Any, trainer: Any, callback: Any, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_text('{"step": 3}')
    trainer.train(kind(tmp_path))
    assert trainer.resumed_from == kind(tmp_path)
    assert load_state(callback._checkpoint) == {"step": 3}


@pytest.mark.parametrize("content", ["", '{"step": 3', "[]", '{"stop": 3}', b"\xff\xfe", None])
def test_a_damaged_state_is_a_new_beginning_with_one_warning(
    content: str | bytes | None, trainer: Any, callback: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / STATE_FILE
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    trainer.train(tmp_path)
    assert load_state(callback._checkpoint) is None
    assert caplog.text.count("nowcasting begins anew") == 1


def test_a_state_that_finds_no_room_costs_itself(
    trainer: Any, callback: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    state: Any = SimpleNamespace(global_step=3)
    callback.on_save(trainer.args, state, None)
    assert json.loads((folder / STATE_FILE).read_text()) == {"step": 3}
    (folder / f"{STATE_FILE}.partial").symlink_to("/dev/full")
    callback.on_save(trainer.args, state, None)
    assert list(folder.iterdir()) == []
    assert caplog.text.count("begins its nowcasting anew") == 1
