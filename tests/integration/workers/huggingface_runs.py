"""A tiny Hugging Face training run, with the callback or without; as a script: a resume with DeepSpeed, as JSON.

Usage: python huggingface_runs.py FOLDER ENDPOINT
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from sidecast import NowcastCallback

VOCABULARY = 31
SEQUENCE = 8
PERIOD_STEPS = 20
# In the middle of the probation of the jump of step 20, and of the next window.
SAVE_STEP = 26
NUM_STEPS = 45

ZERO2 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
}


def section(endpoint: str, **changes: Any) -> dict[str, Any]:
    """Settings of a run that jumps at known steps."""
    plain = {"endpoint": endpoint, "require": True, "period_steps": PERIOD_STEPS, "mode": "sync"}
    return plain | {"max_relative_norm": 1e3} | changes


def train(
    folder: Path,
    settings: Mapping[str, Any] | None,
    *,
    num_steps: int = NUM_STEPS,
    resume: bool | Path = False,
    zero: Mapping[str, Any] | None = None,
    trainer_class: type[Trainer] = Trainer,
    sums: Callable[[Iterable[torch.Tensor]], list[float]] = lambda tensors: [
        tensor.detach().double().sum().item() for tensor in tensors
    ],
) -> dict[str, Any]:
    """Trains; returns the losses by step, the hook's events, and the weights' sums."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            intermediate_size=17,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=4,
            max_position_embeddings=SEQUENCE,
            tie_word_embeddings=True,
        )
    )
    ids = (torch.arange(400).unsqueeze(1) * 7 + torch.arange(SEQUENCE)) % VOCABULARY
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        save_steps=SAVE_STEP,
        logging_steps=1,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        deepspeed=None if zero is None else dict(zero),
    )
    trainer = trainer_class(
        model=model, args=arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]
    )
    events: list[Any] = []
    if settings is not None:
        callback = NowcastCallback(trainer, settings)
        trainer.add_callback(callback)
        trainer.add_callback(_Listener(callback, events))
    # Paths are what transformers takes, whatever its annotations say.
    trainer.train(resume_from_checkpoint=resume)  # type: ignore[arg-type]
    losses = {str(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    shown = [entry["sidecast/num_applied"] for entry in trainer.state.log_history if "sidecast/num_applied" in entry]
    return {"losses": losses, "events": events, "shown": shown, "weights": sums(model.parameters())}


class _Listener(TrainerCallback):
    """Listens once the hook is there; added after the callback."""

    def __init__(self, callback: NowcastCallback, events: list[Any]) -> None:
        self._callback, self._events = callback, events

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._callback.hook.add_listener(lambda event: self._events.append((event.kind, event.step)))


def straight_and_resumed(
    folder: Path, endpoint: str, zero: Mapping[str, Any] | None, **options: Any
) -> list[dict[str, Any]]:
    """One run straight through, and one that stops at its checkpoint and goes on from it."""
    settings = section(endpoint)
    straight = train(folder / "straight", settings, zero=zero, **options)
    train(folder / "resumed", settings, num_steps=SAVE_STEP, zero=zero, **options)
    # Without DeepSpeed the callback finds its state by itself, from a path too.
    resume = folder / "resumed" / f"checkpoint-{SAVE_STEP}" if zero is None else True
    return [straight, train(folder / "resumed", settings, resume=resume, zero=zero, **options)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    results = straight_and_resumed(Path(sys.argv[-2]), sys.argv[-1], ZERO2)
    (Path(sys.argv[-2]) / "results.json").write_text(json.dumps(results))
