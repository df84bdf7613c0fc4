"""``sidecast.attach``: the one door for DeepSpeed's engines and plain loops, and what these loops' checkpoints need."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sidecast.errors import ConfigError
from sidecast.trainer.hook.attachment import Hook
from sidecast.trainer.hook.start import is_disabled
from sidecast.trainer.integrations import deepspeed
from sidecast.trainer.integrations.plain_loop import PlainLoop, loop_of, put_on_loop


def attach(model: Any, optimizer: Any = None, settings: Mapping[str, Any] | None = None) -> Any:
    """Lets a training run be nowcasted by a service. Call it once, on every rank, before the first step.

    **With DeepSpeed**, ``attach(engine)``, right after ``deepspeed.initialize`` and before ``engine.load_checkpoint``:
    the settings are the ds_config's top-level ``"nowcaster"`` section. It wraps the engine's ``step``, ``backward``,
    ``scale``, ``save_checkpoint`` and ``load_checkpoint`` in place, and sees the losses of ``engine.backward(loss)``,
    ``loss.backward()`` and ``engine.scale(loss).backward()``. Without that section nothing is touched.

    **In a plain loop**, ``attach(model, optimizer, {...})``: the model is whole (one process or DDP), or was sharded by
    FSDP2's ``fully_shard``, after which the optimizer was made. Every ``optimizer.step()`` counts as a step; losses are
    the scalars whose ``backward()`` reaches the model's outputs, without a GradScaler's factor. Checkpoints need
    ``save_nowcasting`` and ``resume_nowcasting``.

    With ``"enabled": false`` nothing is touched.

    Args:
        model: A DeepSpeed engine, or the module that the loop calls.
        optimizer: The torch optimizer that trains the module; None with an engine.
        settings: As in the ``"nowcaster"`` section; None: the defaults. With an engine they are in its ds_config.

    Returns:
        The same engine or module.

    Raises:
        ConfigError: The settings, the engine, the optimizer or the model are not ones that can be nowcasted, the
            service refuses the run, or there is no service although ``require`` is set. All ranks raise together.
    """
    if optimizer is None:
        if settings is not None:
            raise ConfigError(
                "sidecast.attach was given settings and no optimizer; allowed: attach(model, optimizer, settings), or "
                "attach(engine) with a 'nowcaster' section in the ds_config"
            )
        return deepspeed.attach(model)
    if not is_disabled(settings):
        put_on_loop(model, optimizer, {} if settings is None else settings)
    return model


def hook_of(model: Any) -> Hook | None:
    """The hook that ``attach`` put on an engine or a module, for listeners and summaries; None if there is none."""
    loop = loop_of(model)
    return deepspeed.hook_of(model) if loop is None else loop.attachment.hook


def save_nowcasting(model: Any, folder: str | os.PathLike[str]) -> None:
    """Adds a plain loop's nowcasting to a checkpoint, so that a resumed run goes on with it; called on every rank.

    It writes small files of its own beside what ``torch.distributed.checkpoint`` or anybody else saves there, at the
    same step. What finds no room costs itself, with a warning. Nothing is done where nowcasting is not enabled.

    Args:
        model: That ``attach`` was given.
        folder: The checkpoint's, made if it is not there; on a file system that all ranks share, or their own.

    Raises:
        ConfigError: The model is an engine, whose own checkpoints hold the nowcasting.
    """
    loop = _loop_of(model, "save_nowcasting")
    if loop is not None:
        loop.save(Path(folder))


def resume_nowcasting(model: Any, folder: str | os.PathLike[str]) -> None:
    """Goes on with a plain loop's nowcasting from a checkpoint; called on every rank.

    Call it after weights and optimizer state were loaded, and before the next step. Where the checkpoint holds no
    nowcasting, it begins anew, with a warning. Nothing is done where nowcasting is not enabled.

    Args:
        model: That ``attach`` was given.
        folder: That ``save_nowcasting`` was given.

    Raises:
        ConfigError: The model is an engine, or the checkpoint changed what a rank holds. All ranks raise together.
    """
    loop = _loop_of(model, "resume_nowcasting")
    if loop is not None:
        loop.resume(Path(folder))


def _loop_of(model: Any, caller: str) -> PlainLoop | None:
    if deepspeed.hook_of(model) is not None:
        raise ConfigError(
            f"sidecast.{caller} was given a DeepSpeed engine, whose checkpoints hold the nowcasting already"
        )
    return loop_of(model)
