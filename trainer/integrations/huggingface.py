"""``NowcastCallback``: nowcasting in the Hugging Face Trainer, with DeepSpeed and without."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from sidecast.trainer.hook.attachment import Attachment
from sidecast.trainer.hook.start import start
from sidecast.trainer.integrations.deepspeed import put_on
from sidecast.trainer.integrations.loggers import numbers_of
from sidecast.trainer.integrations.replicas import replica_of
from sidecast.trainer.integrations.settings import choose_settings
from sidecast.trainer.integrations.state_files import load_state, save_state
from sidecast.trainer.partitions.deepspeed import nowcaster_section


class NowcastCallback(TrainerCallback):
    """Lets a Trainer's model be nowcasted by a service: ``trainer.add_callback(NowcastCallback(trainer, {...}))``.

    With DeepSpeed it sits on the engine as ``sidecast.attach`` does, from before a checkpoint is loaded; without, on
    what one process, DDP or FSDP2 train, at every optimizer step that was applied. Resuming from a checkpoint
    resumes the nowcasting, too.

    Losses are those given to ``accelerator.backward``, times the micro-batches of their step, so that gradient
    accumulation does not change their scale. Whenever the Trainer logs a loss, it logs ``sidecast/num_applied`` and
    more of the hook's summary with it. For all this it wraps ``train`` and ``log`` of this Trainer and ``prepare`` and
    ``backward`` of its accelerator: add it before ``train`` is called.

    Args:
        trainer: Which it will be added to.
        settings: As in the ``"nowcaster"`` section; None: that section of the Trainer's ds_config.

    Raises:
        ConfigError: From ``trainer.train()``: the settings, the model or the optimizer are not ones that can be
            nowcasted, or the service refuses the run.
    """

    def __init__(self, trainer: Trainer, settings: Mapping[str, Any] | None = None) -> None:
        self._trainer = trainer
        self._settings = settings
        self._attachment: Attachment | None = None
        self._checkpoint: Path | None = None
        self._num_steps = 0
        self._accelerator: Any = None
        self._wrap_train()
        self._wrap_accelerator()

    @property
    def hook(self) -> Any:
        """The hook, for listeners and summaries; None before training begins and where settings disable it."""
        return None if self._attachment is None else self._attachment.hook

    # --- the Trainer's events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.is_deepspeed_enabled:
            return
        self._close()
        section = choose_settings(self, self._settings, None)
        if section is None:
            return
        assert self._trainer.model is not None
        self._num_steps = state.global_step
        run = replica_of(
            self._trainer.model,
            _inner(self._trainer.optimizer),
            lambda: self._num_steps,
            max(0, args.local_process_index),
        )
        self._attachment = start(section, run)
        if state.global_step > 0:
            # Where hosts share no folder, only some ranks may have it; fp16 overflows are in the Trainer's step alone.
            saved = self._attachment.from_first(load_state(self._checkpoint))
            self._num_steps = state.global_step if saved is None else saved["step"]
            self._attachment.resume(saved, self._checkpoint)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        is_engine = self._trainer.is_deepspeed_enabled
        if self._attachment is None or is_engine or self._trainer.accelerator.optimizer_step_was_skipped:
            return
        self._num_steps += 1
        self._attachment.after_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._attachment is None or self._trainer.is_deepspeed_enabled:
            return
        folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        save_state(self._attachment, folder, is_writer=args.should_save)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The hook stays, for its summary.
        if self._attachment is not None:
            self._attachment.close()

    # --- around the Trainer's methods

    def _wrap_train(self) -> None:
        train, output_dir = self._trainer.train, self._trainer.args.output_dir
        log, is_writing = self._trainer.log, self._trainer.is_world_process_zero
        create_accelerator = self._trainer.create_accelerator_and_postprocess

        def train_from(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            if resume_from_checkpoint is True:
                resume_from_checkpoint = get_last_checkpoint(output_dir) or True
            is_path = isinstance(resume_from_checkpoint, str | os.PathLike)
            self._checkpoint = Path(resume_from_checkpoint) if is_path else None
            # Whoever uses the Trainer may have given it another.
            self._wrap_accelerator()
            return train(resume_from_checkpoint, *args, **kwargs)

        def create_accelerator_and_wrap(*args: Any, **kwargs: Any) -> None:
            # As a search for hyperparameters does for each of its trials.
            create_accelerator(*args, **kwargs)
            self._wrap_accelerator()

        def log_with_nowcasts(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            # In the Trainer's own rows: each call is a line on somebody's screen.
            if self._attachment is not None and logs.keys() & {"loss", "train_loss"} and is_writing():
                # In place: what the Trainer adds to its row, it reads there.
                logs.update(numbers_of(self._attachment.hook))
            log(logs, *args, **kwargs)

        for name, method in (
            ("train", train_from),
            ("log", log_with_nowcasts),
            ("create_accelerator_and_postprocess", create_accelerator_and_wrap),
        ):
            setattr(self._trainer, name, method)

    def _wrap_accelerator(self) -> None:
        trainer, accelerator = self._trainer, self._trainer.accelerator
        if accelerator is self._accelerator:
            return
        self._accelerator = accelerator
        prepare: Callable[..., Any] = accelerator.prepare
        backward: Callable[..., Any] = accelerator.backward

        def prepare_and_attach(*args: Any, **kwargs: Any) -> Any:
            prepared = prepare(*args, **kwargs)
            # Evaluation prepares an engine, too, but one that does not train.
            if trainer.is_deepspeed_enabled and trainer.is_in_train:
                for item in prepared if isinstance(prepared, tuple) else (prepared,):
                    if hasattr(item, "zero_optimization_stage"):
                        self._attach(item)
            return prepared

        def observe_and_backward(loss: Any, **kwargs: Any) -> Any:
            if self._attachment is not None and torch.is_tensor(loss):
                self._attachment.observe(loss.detach() * trainer.current_gradient_accumulation_steps)
            return backward(loss, **kwargs)

        accelerator.prepare, accelerator.backward = prepare_and_attach, observe_and_backward

    def _attach(self, engine: Any) -> None:
        self._close()
        section = choose_settings(self, self._settings, nowcaster_section(engine))
        if section is not None:
            self._attachment = put_on(engine, section, sees_losses=False)

    def _close(self) -> None:
        if self._attachment is not None:
            self._attachment.close()
        self._attachment = None


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer
