"""``NowcastOptimizer``: nowcasting around a torch optimizer, in one process and without a service."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import Predictor
from sidecast.predictors.registry import create_predictor
from sidecast.trainer.hook.attachment import Attachment
from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.hook.config import JUMP_SETTINGS, NowcasterConfig, parse_section
from sidecast.trainer.hook.jump import require_learning_rates
from sidecast.trainer.hook.ranks import Ranks
from sidecast.trainer.hook.rollback_memory import reserve_rollback_copy
from sidecast.trainer.integrations.in_process import InProcessNowcaster
from sidecast.trainer.integrations.replicas import replica_of
from sidecast.trainer.partitions import Partition

STATE_KEY = "sidecast"

# What has a meaning in one process; the others are about ranks, the courier and the service.
_SETTINGS = {*JUMP_SETTINGS, "max_staleness_steps", "max_relative_norm"} - {"predictor", "context_len", "period_steps"}


class NowcastOptimizer(torch.optim.Optimizer):
    """Lets a single-process script jump ahead now and then, with any torch optimizer and any model.

    Every ``period_steps / context_len`` steps the parameters are copied to host memory; every ``period_steps`` steps
    a predictor looks at the last ``context_len`` copies and the parameters become what it predicts. A jump is on
    probation for ``probation_steps``: it is undone, bit for bit, if the losses given to ``observe`` do not come back to
    their trend. Use it wherever the optimizer was used: with schedulers, ``GradScaler``, closures and checkpoints.

    It keeps ``4 * (context_len + 1)`` bytes per parameter in host memory (4 more if ``asynchronous``), and 12 more with
    Adam for undoing a jump.

    Args:
        optimizer: Any torch optimizer of fp32 parameters.
        model: The module whose parameters it trains, without DDP's wrapper.
        predictor: A predictor's name, or a predictor.
        weights: Weights file, for predictors that are trained, such as ``nino``.
        context_len: States per nowcast.
        period_steps: Optimizer steps between nowcasts; a multiple of ``context_len``.
        asynchronous: Predict on a thread while training goes on; the jump then comes some steps later, and
            weighs less.
        settings: More settings of the ``"nowcaster"`` section, under their names there: ``predictor_options``,
            ``horizon``, ``max_steps``, ``max_weight``, ``max_relative_norm``, ``probation_steps``, ``rollback``, ...

    Raises:
        ConfigError: A setting, the optimizer, the model or the predictor is not one that this works with.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        predictor: str | Predictor = "linear",
        *,
        weights: str | Path | None = None,
        context_len: int = 5,
        period_steps: int = 1000,
        asynchronous: bool = False,
        **settings: Any,
    ) -> None:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ConfigError(
                f"NowcastOptimizer is for a single process, and this is one of {dist.get_world_size()}: use "
                "sidecast.attach, or the Hugging Face or Lightning callback"
            )
        # Not initialised as an optimizer of its own: groups, state and hooks are those of the one inside.
        self.optimizer = optimizer
        name = predictor if isinstance(predictor, str) else predictor.name
        section = _section(name, context_len, period_steps, asynchronous, settings)
        config = parse_section(section)
        ranks = Ranks(None)
        run = replica_of(model, optimizer, lambda: self._num_steps, local_rank=0)
        partition = Partition(run.map_layout)
        require_learning_rates(config, partition)
        manifest = ModelManifest(partition.parameters, run.model_config, partition.aliases)
        if isinstance(predictor, str):
            path = None if weights is None else Path(weights)
            predictor = create_predictor(predictor, weights=path, options=config.predictor_options)
        self._messenger = InProcessNowcaster(config, manifest, predictor)
        self._num_steps = 0
        self.hook = NowcastHook(
            config,
            partition,
            self._messenger,
            ranks.votes(),
            step=0,
            run_id=uuid.uuid4().hex[:16],
            rollback_copy=reserve_rollback_copy(config, partition),
        )
        """The hook: ``add_listener`` tells of every jump, ``summary()`` counts them, ``close()`` frees the memory."""
        self._attachment = Attachment(run, self.hook, partition, ranks)

    def observe(self, loss: Tensor | float) -> None:
        """Gives the mean loss of one micro-batch, before ``step``; not needed with a closure that returns it."""
        self._attachment.observe(loss)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes the inner optimizer's step, and what is due after it."""
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        if loss is not None:
            self.observe(loss)
        self._num_steps += 1
        self._attachment.after_step()
        return loss

    # --- the optimizer inside

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        # The hooks that torch's own methods register and call, such as register_step_post_hook.
        if name.startswith("_optimizer_"):
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hook.config.predictor!r}, {self.optimizer!r})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the states of a window must all be of the same parameters.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("NowcastOptimizer cannot take further parameters; add them before wrapping the optimizer")

    # --- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and under ``"sidecast"`` the window, the schedule and a jump on probation.

        The inner optimizer can load it, too. It loads with ``torch.load(weights_only=True)``.
        """
        own = {
            "num_steps": self._num_steps,
            "hook": self._attachment.state_dict(),
            "window": self._messenger.state_dict(),
            "rollback": self._attachment.rollback_state(),
        }
        return {**self.optimizer.state_dict(), STATE_KEY: own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was called; with the inner optimizer's state alone, begins a new window.

        Load the model's parameters before it.
        """
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != STATE_KEY})
        own = state_dict.get(STATE_KEY, {"num_steps": 0, "hook": None, "window": None, "rollback": None})
        self._num_steps = own["num_steps"]
        self._attachment.resume(own["hook"], None, own["rollback"])
        self._messenger.load_state_dict(own["window"])


def _section(
    predictor: str, context_len: int, period_steps: int, asynchronous: bool, settings: Mapping[str, Any]
) -> dict[str, Any]:
    for key in settings:
        if key not in _SETTINGS:
            raise ConfigError(
                f"NowcastOptimizer has no setting {key!r}; allowed: context_len, period_steps, weights, asynchronous, "
                f"{', '.join(sorted(_SETTINGS & NowcasterConfig.__dataclass_fields__.keys()))}"
            )
    return {
        **settings,
        "predictor": predictor,
        "context_len": context_len,
        "period_steps": period_steps,
        "mode": "async" if asynchronous else "sync",
        # A vote among one costs nothing, and one at each step leaves nothing half counted in a checkpoint.
        "vote_interval_steps": 1,
        "vote_lag_steps": 0,
    }
