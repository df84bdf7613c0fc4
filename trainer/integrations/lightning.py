"""``LightningNowcastCallback``: nowcasting in Lightning's Trainer, with its DeepSpeed strategy and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.trainer.hook.attachment import Attachment
from sidecast.trainer.hook.start import start
from sidecast.trainer.integrations.deepspeed import put_on
from sidecast.trainer.integrations.loggers import log_numbers
from sidecast.trainer.integrations.optimizer_steps import OptimizerSteps
from sidecast.trainer.integrations.replicas import replica_of
from sidecast.trainer.integrations.settings import choose_settings
from sidecast.trainer.partitions.deepspeed import nowcaster_section


class LightningNowcastCallback(Callback):
    """Lets a LightningModule be nowcasted by a service: ``Trainer(callbacks=[LightningNowcastCallback({...})])``.

    With the DeepSpeed strategy it sits on the engine as ``sidecast.attach`` does; without, on what one process, DDP or
    FSDP2 (``ModelParallelStrategy``) train, after every optimizer step that a GradScaler did not skip. Its state, with
    the copy for undoing a jump on probation, is part of Lightning's checkpoints; with FSDP2 they hold rank 0's copy
    alone, and a resumed run keeps that jump. The Trainer's loggers are given ``sidecast/num_applied`` and more of the
    hook's summary at every event.

    Args:
        settings: As in the ``"nowcaster"`` section; None: that section of the DeepSpeed strategy's config.

    Raises:
        ConfigError: From ``trainer.fit()``: the settings, the model or the optimizer are not ones that can be
            nowcasted, or the service refuses the run.
    """

    def __init__(self, settings: Mapping[str, Any] | None = None) -> None:
        self._settings = settings
        self._attachment: Attachment | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._is_engine = False
        self._num_steps = 0
        self._steps: OptimizerSteps | None = None

    @property
    def hook(self) -> Any:
        """The hook, for listeners and summaries; None before training begins and where settings disable it."""
        return None if self._attachment is None else self._attachment.hook

    # --- the Trainer's events

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning loads an engine's checkpoint after this; the engine then tells the hook.
        self._is_engine = isinstance(trainer.strategy, DeepSpeedStrategy)
        if not isinstance(trainer.strategy, DeepSpeedStrategy):
            return
        engine = trainer.strategy.deepspeed_engine
        section = choose_settings(self, self._settings, nowcaster_section(engine))
        if section is not None:
            self._attachment = put_on(engine, section)
            self._log_numbers(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_engine:
            return
        section = choose_settings(self, self._settings, None)
        if section is None:
            return
        if len(trainer.optimizers) != 1:
            raise ConfigError(f"the LightningModule has {len(trainer.optimizers)} optimizers; nowcasting supports one")
        optimizer = trainer.optimizers[0]
        self._num_steps = trainer.global_step
        run = replica_of(pl_module, optimizer, lambda: self._num_steps, trainer.local_rank)
        self._attachment = start(section, run)
        self._log_numbers(trainer)
        if trainer.global_step > 0:
            state = self._loaded or {}
            saved = self._attachment.from_first(state.get("hook"))
            # Lightning's step counts what a GradScaler has skipped, too.
            self._num_steps = trainer.global_step if saved is None else saved["step"]
            self._attachment.resume(saved, None, state.get("rollback"))
        self._loaded = None
        self._steps = OptimizerSteps(optimizer, self._after_step, self._attachment.hook.after_skipped_step)

    def _log_numbers(self, trainer: Trainer) -> None:
        """Has them written by the Trainer's loggers, at the step that Lightning has counted so far."""
        if not trainer.is_global_zero or self._attachment is None:
            return

        def write(numbers: dict[str, float]) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=trainer.global_step)

        log_numbers(self._attachment.hook, write)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._attachment is not None and not self._is_engine:
            # Lightning has divided it, and scaled it if there is a GradScaler.
            loss = loss.detach() * trainer.accumulate_grad_batches
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                loss = loss / scaler.scale(torch.ones((), device=loss.device))
            self._attachment.observe(loss)

    def _after_step(self) -> None:
        """Is called after every step that the optimizer made itself, of which a batch may bring several or none."""
        assert self._attachment is not None
        self._num_steps += 1
        self._attachment.after_step()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        # The hook stays, for its summary.
        if self._steps is not None:
            self._steps.remove()
        if self._attachment is not None:
            self._attachment.close()

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The hook's state and the rollback copy; empty with DeepSpeed, where the engine's own checkpoint has them."""
        if self._attachment is None or self._is_engine:
            return {}
        return {"hook": self._attachment.state_dict(), "rollback": self._attachment.rollback_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps what ``state_dict`` gave until training begins."""
        self._loaded = state_dict
