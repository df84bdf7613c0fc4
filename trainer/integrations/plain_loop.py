"""Nowcasting in a plain torch loop: the optimizer tells of its steps, the model's outputs of its losses."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sidecast.errors import ConfigError
from sidecast.trainer.hook.attachment import Attachment
from sidecast.trainer.hook.start import start
from sidecast.trainer.integrations.optimizer_steps import OptimizerSteps
from sidecast.trainer.integrations.replicas import replica_of
from sidecast.trainer.integrations.state_files import STATE_FILE, load_state, save_state
from sidecast.trainer.partitions.module_losses import ModuleLossWatch
from sidecast.trainer.partitions.plain import shard_again

log = logging.getLogger(__name__)

# More than anybody accumulates gradients over.
MANY_LOSSES = 2000

# On the optimizer, which leaves it out of copies and pickles of itself, as a model would not.
_LOOP_ATTRIBUTE = "_sidecast_loop"

_optimizers: weakref.WeakKeyDictionary[nn.Module, weakref.ref[torch.optim.Optimizer]] = weakref.WeakKeyDictionary()


class PlainLoop:
    """The hook on a model and its optimizer, called at every step that the optimizer makes; made on every rank.

    Args:
        model: What the loop calls; DDP's wrapper is looked through.
        optimizer: The torch optimizer itself.
        settings: As in the ``"nowcaster"`` section; they are enabled.

    Attributes:
        attachment: The hook on its run.

    Raises:
        ConfigError: The settings, the model or the optimizer are not ones that can be nowcasted, or the service refuses
            the run. All ranks raise together.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]) -> None:
        self._num_steps = 0
        self._num_losses_since_step = 0
        self._module = model.module if isinstance(model, DistributedDataParallel) else model
        self._optimizer = weakref.ref(optimizer)
        local_rank = dist.get_node_local_rank(fallback_rank=0) if dist.is_available() else 0
        run = replica_of(self._module, optimizer, lambda: self._num_steps, local_rank)
        self.attachment: Attachment = start(settings, run)
        self._losses: ModuleLossWatch | None = ModuleLossWatch(model, self._observe)
        self._steps = OptimizerSteps(optimizer, self._after_step, self.attachment.hook.after_skipped_step)
        setattr(optimizer, _LOOP_ATTRIBUTE, self)
        for face in _faces(model):
            _optimizers[face] = weakref.ref(optimizer)

    def save(self, folder: Path) -> None:
        """Adds the nowcasting to a checkpoint's folder; called on every rank.

        Args:
            folder: Made if it is not there.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("a run that resumes from %s begins its nowcasting anew: %s", folder, error)
            return
        save_state(self.attachment, folder, is_writer=not dist.is_initialized() or dist.get_rank() == 0)

    def resume(self, folder: Path) -> None:
        """Goes on from a checkpoint whose weights and optimizer state were just loaded; called on every rank.

        Args:
            folder: That ``save`` was given. Without its files nowcasting begins anew, with a warning.

        Raises:
            ConfigError: The checkpoint changed what a rank holds. All ranks raise together.
        """
        optimizer = self._optimizer()
        if self.attachment.hook.is_closed or optimizer is None:
            return
        shard_again(self._module, optimizer)
        saved = self.attachment.from_first(load_state(folder))
        if saved is None:
            log.warning("nowcasting begins anew: %s holds no %s that can be read", folder, STATE_FILE)
        else:
            self._num_steps = saved["step"]
        self.attachment.resume(saved, folder)

    def let_go(self) -> None:
        """Leaves the model and the optimizer as they were; for one whose hook is closed."""
        self._steps.remove()
        self._losses = None

    def _observe(self, loss: Tensor) -> None:
        if self.attachment.hook.is_closed:
            return
        self._num_losses_since_step += 1
        if self._num_losses_since_step == MANY_LOSSES:
            log.warning(
                "nothing is nowcasted: the optimizer that sidecast.attach was given has made no step in %d backward "
                "passes; if another one trains the model now, close the hook and attach to that one",
                MANY_LOSSES,
            )
        self.attachment.observe(loss)

    def _after_step(self) -> None:
        self._num_losses_since_step = 0
        if self.attachment.hook.is_closed:
            # The rest of ``let_go`` cannot be done while torch goes through these hooks.
            self._losses = None
            return
        self._num_steps += 1
        self.attachment.after_step()


def loop_of(model: Any) -> PlainLoop | None:
    """The loop that ``attach`` was called on with this model; None if there is none."""
    reference = next((_optimizers[face] for face in _faces(model) if face in _optimizers), None)
    optimizer = None if reference is None else reference()
    return getattr(optimizer, _LOOP_ATTRIBUTE, None)


def _faces(model: Any) -> Iterator[nn.Module]:
    """A model, and what it is without the wrappers of DDP and torch.compile."""
    if isinstance(model, nn.Module):
        yield model
        for name in ("module", "_orig_mod"):
            yield from _faces(getattr(model, name, None))


def put_on_loop(model: nn.Module, optimizer: Any, settings: Mapping[str, Any]) -> PlainLoop:
    """Lets a model be nowcasted that an optimizer trains; on every rank.

    Args:
        model: What the loop calls.
        optimizer: What trains it; accelerate's wrapper is looked through.
        settings: As in the ``"nowcaster"`` section; they are enabled.

    Raises:
        ConfigError: As for ``PlainLoop``, or these two are nowcasted already.
    """
    inner = optimizer
    # Others that hold an optimizer keep weights of their own, or step it in the middle of their own step.
    while type(inner).__module__.startswith("accelerate.") and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the model is a {type(model).__name__}; allowed: a torch.nn.Module")
    if not isinstance(inner, torch.optim.Optimizer):
        raise ConfigError(f"the optimizer is a {type(inner).__name__}; allowed: one torch.optim.Optimizer")
    for loop in (loop_of(model), getattr(inner, _LOOP_ATTRIBUTE, None)):
        if loop is None:
            continue
        if loop.attachment.hook.is_closed:
            loop.let_go()
            continue
        raise ConfigError("sidecast.attach was called twice on this model or its optimizer; once is enough")
    num_processes = os.environ.get("WORLD_SIZE", "1")
    if num_processes not in ("", "1") and not (dist.is_available() and dist.is_initialized()):
        # Each of them would jump on its own.
        raise ConfigError(
            f"WORLD_SIZE is {num_processes}, and the processes do not know of each other yet; allowed: "
            "sidecast.attach after torch.distributed.init_process_group"
        )
    return PlainLoop(model, inner, settings)
