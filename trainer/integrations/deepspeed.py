"""``sidecast.attach(engine)``: puts the hook around a DeepSpeed engine, in place."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sidecast.errors import ConfigError
from sidecast.trainer.hook.attachment import Attachment, Hook
from sidecast.trainer.hook.start import is_disabled, start
from sidecast.trainer.hook.training_run import TrainingRun, model_config_of
from sidecast.trainer.integrations.loggers import log_numbers
from sidecast.trainer.partitions.deepspeed import applied_steps, layout_of, nowcaster_section, skipped_steps, zero_stage
from sidecast.trainer.partitions.deepspeed_losses import LossWatch
from sidecast.trainer.partitions.trainable import TrainedNames

CLIENT_STATE_KEY = "sidecast"

# On the engine itself: a hook that is filed anywhere else keeps alive the engine that its partition refers to.
_HOOK_ATTRIBUTE = "_sidecast_hook"


def hook_of(engine: Any) -> Hook | None:
    """The hook that ``attach`` put around an engine; None if nowcasting is not enabled."""
    hook: Hook | None = getattr(engine, "__dict__", {}).get(_HOOK_ATTRIBUTE)
    return hook


def attach(engine: Any) -> Any:
    """Lets a DeepSpeed engine be nowcasted, as its ds_config's top-level ``"nowcaster"`` section says.

    Call it once on every rank, right after ``deepspeed.initialize`` and before ``engine.load_checkpoint``. It
    wraps the engine's ``step``, ``backward``, ``scale``, ``save_checkpoint`` and ``load_checkpoint`` in place, and sees
    the losses of ``engine.backward(loss)``, ``loss.backward()`` and ``engine.scale(loss).backward()``. Without that
    section, or with ``"enabled": false``, nothing is touched.

    Args:
        engine: What ``deepspeed.initialize`` returned.

    Returns:
        The same engine.

    Raises:
        ConfigError: The section, the engine or the model is not one that can be nowcasted, the service refuses
            it, or there is no service although ``require`` is set. All ranks raise together.
    """
    section = nowcaster_section(engine)
    if section is None or is_disabled(section):
        return engine
    put_on(engine, section)
    return engine


def put_on(engine: Any, section: Any, *, sees_losses: bool = True) -> Attachment:
    """``attach`` with settings of any origin, which are enabled.

    Args:
        engine: What ``deepspeed.initialize`` returned.
        section: The settings, unchecked.
        sees_losses: Whether the losses whose backward pass reaches the engine are those to judge by; False if the
            caller gives them to the attachment itself.
    """
    if hook_of(engine) is not None:
        raise ConfigError("sidecast.attach was called twice on this engine; once is enough")
    if not dist.is_initialized():
        raise ConfigError("sidecast.attach needs torch.distributed; call deepspeed.initialize first")
    attachment = start(section, _run_of(engine))
    setattr(engine, _HOOK_ATTRIBUTE, attachment.hook)
    wrap(engine, attachment, sees_losses=sees_losses)
    if dist.get_rank() == 0 and engine.monitor.enabled:
        log_numbers(attachment.hook, _writer_of(engine))
    return attachment


def _writer_of(engine: Any) -> Callable[[dict[str, float]], None]:
    """Writes where the engine itself writes of its run: whatever monitors its ds_config has."""
    # Weakly, as the hook keeps it.
    engine_ref = weakref.ref(engine)

    def write(numbers: dict[str, float]) -> None:
        engine = engine_ref()
        if engine is None:
            return
        samples = engine.global_samples
        engine.monitor.write_events([(f"Train/Samples/{name}", value, samples) for name, value in numbers.items()])

    return write


def _run_of(engine: Any) -> TrainingRun:
    # Weakly: whoever keeps the hook, for its summary, must not keep the engine.
    engine_ref = weakref.ref(engine)
    names = TrainedNames()
    return TrainingRun(
        map_layout=lambda: layout_of(engine_ref(), names),
        applied_steps=lambda: applied_steps(engine_ref()),
        model_config=model_config_of(engine.module),
        local_rank=int(engine.local_rank),
        stage=str(zero_stage(engine)),
    )


def wrap(engine: Any, attachment: Attachment, *, sees_losses: bool = True) -> None:
    """Makes the engine's methods tell the hook of steps, losses and checkpoints."""
    step = engine.step
    destroy: Any = getattr(engine, "destroy", None)
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def step_and_nowcast(*args: Any, **kwargs: Any) -> Any:
        num_skipped = skipped_steps(engine)
        result = step(*args, **kwargs)
        if engine.was_step_applied():
            attachment.after_step()
        elif skipped_steps(engine) > num_skipped:
            attachment.hook.after_skipped_step()
        return result

    def save_checkpoint(
        save_dir: Any, tag: Any = None, client_state: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        tag = f"global_step{engine.global_steps}" if tag is None else tag
        state = attachment.state_dict()
        if state is not None:
            client_state = {**(client_state or {}), CLIENT_STATE_KEY: state}
        result = save(save_dir, tag, client_state or {}, *args, **kwargs)
        attachment.save_rollback_copy(Path(save_dir) / str(tag))
        return result

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, client_state = load(*args, **kwargs)
        if path is not None:
            state = (client_state or {}).pop(CLIENT_STATE_KEY, None)
            attachment.resume(state, Path(path).parent)
        return path, client_state

    def close_and_destroy(*args: Any, **kwargs: Any) -> Any:
        # As DeepSpeed does, too, at the very end of a process: too late for other ranks, and the courier sees it end.
        if not sys.is_finalizing():
            attachment.close()
        return destroy(*args, **kwargs)

    if sees_losses:
        LossWatch(engine, attachment.observe)
    engine.step = step_and_nowcast
    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint
    if hasattr(engine, "destroy"):
        engine.destroy = close_and_destroy
