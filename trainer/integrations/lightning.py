"""``LightningNowcastCallback``: nowcasting in Lightning's Trainer, with its DeepSpeed strategy and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from sidecast.errors import ConfigError
from sidecast.trainer.hook.attachment import Attachment
from sidecast.trainer.hook.start import start
from sidecast.trainer.integrations.deepspeed import put_on
from sidecast.trainer.integrations.replicas import replica_of
from sidecast.trainer.integrations.settings import choose_settings
from sidecast.trainer.partitions.deepspeed import nowcaster_section


class LightningNowcastCallback(Callback):
    """Lets a LightningModule be nowcasted by a service: ``Trainer(callbacks=[LightningNowcastCallback({...})])``.

    With the DeepSpeed strategy it sits on the engine as ``sidecast.attach`` does; without, on what one process, DDP or
    FSDP2 (``ModelParallelStrategy``) train, after every optimizer step that a GradScaler did not skip. Its state, with
    the copy for undoing a jump on probation, is part of Lightning's checkpoints; with FSDP2 they hold rank 0's copy
    alone, and a resumed run keeps that jump.

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
        self._step_hook: RemovableHandle | None = None

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
        if trainer.global_step > 0:
            state = self._loaded or {}
            saved = self._attachment.from_first(state.get("hook"))
            # Lightning's step counts what a GradScaler has skipped, too.
            self._num_steps = trainer.global_step if saved is None else saved["step"]
            self._attachment.resume(saved, None, state.get("rollback"))
        self._loaded = None
        self._step_hook = optimizer.register_step_post_hook(self._after_optimizer_step)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._attachment is not None and not self._is_engine:
            # Lightning has divided it, and scaled it if there is a GradScaler.
            loss = loss.detach() * trainer.accumulate_grad_batches
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            if scaler is not None:
                loss = loss / scaler.scale(torch.ones((), device=loss.device))
            self._attachment.observe(loss)

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Is called after every step that the optimizer made itself, of which a batch may bring several or none."""
        if self._attachment is None:
            return
        # A GradScaler lets a fused optimizer find out by itself that there is nothing to do.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        self._num_steps += 1
        self._attachment.after_step()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        # The hook stays, for its summary.
        if self._step_hook is not None:
            self._step_hook.remove()
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
