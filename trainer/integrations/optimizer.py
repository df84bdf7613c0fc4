"""``NowcastOptimizer``: nowcasting around a torch optimizer, in one process and without a service."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import Predictor
from sidecast.predictors.registry import create_predictor
from sidecast.trainer.hook.attachment import Attachment
from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.hook.config import JUMP_SETTINGS, NowcasterConfig, parse_section, require_unset
from sidecast.trainer.hook.jump import require_learning_rates
from sidecast.trainer.hook.ranks import Ranks
from sidecast.trainer.hook.reporting import log_event
from sidecast.trainer.hook.rollback_memory import reserve_rollback_copy
from sidecast.trainer.integrations.in_process import InProcessNowcaster
from sidecast.trainer.integrations.in_process_pushes import InProcessPusher
from sidecast.trainer.integrations.replicas import replica_of
from sidecast.trainer.partitions import Partition
from sidecast.trainer.partitions.step_hooks import uncompiled

STATE_KEY = "sidecast"

# What has a meaning in one process; the others are about ranks, the courier and the service.
_SETTINGS = {*JUMP_SETTINGS, "max_staleness_steps", "max_relative_norm"} - {"predictor", "context_len", "period_steps"}


class NowcastOptimizer(torch.optim.Optimizer):
    """Lets a single-process script jump ahead now and then, or pushes it on, with any torch optimizer and any model.

    Use it wherever the optimizer was used: with schedulers, ``GradScaler``, closures and checkpoints.

    **Jumps.** Every ``period_steps / context_len`` steps the parameters are copied to host memory; every
    ``period_steps`` steps a predictor looks at the last ``context_len`` copies and the parameters become what it
    predicts. A jump is on probation for ``probation_steps``: it is undone, bit for bit, if the losses given to
    ``observe`` do not come back to their trend. This keeps ``4 * (context_len + 1)`` bytes per parameter in host memory
    (4 more if ``asynchronous``), and 12 more with Adam for undoing a jump.

    **Pushes.** Every ``push.interval_steps`` steps a multiple of the average that the parameters moved by, pushes taken
    out, is added to them. None is undone; a rise of the losses given to ``observe`` ends them all, and without losses
    there are none. This keeps 16 bytes per parameter in host memory, and no copy for undoing anything.

    Args:
        optimizer: Any torch optimizer of fp32 parameters.
        model: The module whose parameters it trains, without DDP's wrapper.
        predictor: A predictor's name, or a predictor; of jumps.
        policy: ``"jump"`` or ``"push"``.
        push: Settings of pushes, under their names in the ``"nowcaster"`` section's ``push``: ``interval_steps``,
            ``time_constant_steps``, ``gain``, ``start_step``, ``stop_step``, ``max_relative_norm``.
        weights: Weights file, for predictors that are trained, such as ``nino``.
        context_len: States per jump.
        period_steps: Optimizer steps between jumps; a multiple of ``context_len``.
        asynchronous: Predict on a thread while training goes on; what is applied then comes some steps later, and
            weighs less (a push from half an interval on).
        settings: More settings of the ``"nowcaster"`` section, under their names there: ``predictor_options``,
            ``horizon``, ``max_steps``, ``max_weight``, ``max_relative_norm``, ``probation_steps``, ``rollback``, ...

    Raises:
        ConfigError: A setting, the optimizer, the model or the predictor is not one that this works with; or a setting
            belongs to the other policy.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        predictor: str | Predictor = "linear",
        *,
        policy: Literal["jump", "push"] = "jump",
        push: Mapping[str, Any] | None = None,
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
        named: dict[str, Any] = {
            "policy": policy,
            "predictor": predictor if isinstance(predictor, str) else predictor.name,
            "context_len": context_len,
            "period_steps": period_steps,
        }
        if push is not None:
            named["push"] = push
        config = parse_section(_section(named, asynchronous, settings))
        ranks = Ranks(None)
        run = replica_of(model, optimizer, lambda: self._num_steps, local_rank=0)
        partition = Partition(run.map_layout)
        require_learning_rates(config, partition)
        manifest = ModelManifest(partition.parameters, run.model_config, partition.aliases)
        self._messenger: InProcessNowcaster | InProcessPusher
        if config.policy == "push":
            require_unset("weights", weights, None, config.policy)
            require_unset("predictor", predictor, NowcasterConfig.predictor, config.policy)
            self._messenger = InProcessPusher(config, manifest.num_elements)
        else:
            if isinstance(predictor, str):
                path = None if weights is None else Path(weights)
                predictor = create_predictor(predictor, weights=path, options=config.predictor_options)
            self._messenger = InProcessNowcaster(config, manifest, predictor)
        self._partition = partition
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
        """The hook: ``add_listener`` tells of every jump or push, ``summary()`` counts them, ``close()`` frees the
        memory."""
        self.hook.add_listener(log_event)
        self._attachment = Attachment(run, self.hook, partition, ranks)
        self._before, self._after = uncompiled(self._before_step), uncompiled(self._after_step)

    def observe(self, loss: Tensor | float) -> None:
        """Gives the mean loss of one micro-batch, before ``step``; not needed with a closure that returns it."""
        self._attachment.observe(loss)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes the inner optimizer's step, and what is due after it."""
        self._before()
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        self._after(loss)
        return loss

    def _before_step(self) -> None:
        self._messenger.before_step(self._num_steps, self.hook.learning_rate_sum, self._partition)

    def _after_step(self, loss: Tensor | float | None) -> None:
        if loss is not None:
            self.observe(loss)
        self._num_steps += 1
        self._attachment.after_step()

    # --- the optimizer inside

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def __getattr__(self, name: str) -> Any:
        # The hooks that torch's own methods register and call, such as register_step_post_hook; and the two modes of
        # optimizers that evaluate other weights than they train, which those that have none must not seem to have.
        if name.startswith("_optimizer_") or name in ("train", "eval"):
            return getattr(self.optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        config = self.hook.config
        predictor = f", predictor={config.predictor!r}" if config.policy == "jump" else ""
        return f"{type(self).__name__}({self.optimizer!r}, policy={config.policy!r}{predictor})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: all states that are compared must be of the same parameters.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError("NowcastOptimizer cannot take further parameters; add them before wrapping the optimizer")

    # --- checkpoints

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be copied or pickled: it holds the model's own parameters, shared memory and perhaps a thread.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "NowcastOptimizer cannot be pickled or copied; save its state_dict(), and load that into one that is made "
            "around the new optimizer and model"
        )

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and under ``"sidecast"`` what goes on: the schedule, and of jumps the window and
        one on probation, of pushes the average, the state that the interval began with, and what is not applied yet.

        The inner optimizer can load it, too. It loads with ``torch.load(weights_only=True)``.
        """
        own = {
            "num_steps": self._num_steps,
            "hook": self._attachment.state_dict(),
            self._messenger.state_key: self._messenger.state_dict(),
            "rollback": self._attachment.rollback_state(),
        }
        return {**self.optimizer.state_dict(), STATE_KEY: own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on where ``state_dict`` was called. Given the inner optimizer's state alone, or that of a run with the
        other policy, it begins a new window or average.

        Load the model's parameters before it.

        Raises:
            ConfigError: It is of another model.
        """
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != STATE_KEY})
        own = state_dict.get(STATE_KEY, {"num_steps": 0, "hook": None, "rollback": None})
        self._num_steps = own["num_steps"]
        self._attachment.resume(own["hook"], None, own["rollback"])
        self._messenger.load_state_dict(own.get(self._messenger.state_key))


def _section(named: Mapping[str, Any], asynchronous: bool, settings: Mapping[str, Any]) -> dict[str, Any]:
    for key in settings:
        if key not in _SETTINGS:
            raise ConfigError(
                f"NowcastOptimizer has no setting {key!r}; allowed: context_len, period_steps, weights, asynchronous, "
                "policy, push, "
                f"{', '.join(sorted(_SETTINGS & NowcasterConfig.__dataclass_fields__.keys()))}"
            )
    return {
        **settings,
        **named,
        "mode": "async" if asynchronous else "sync",
        # A vote among one costs nothing, and one at each step leaves nothing half counted in a checkpoint.
        "vote_interval_steps": 1,
        "vote_lag_steps": 0,
    }
