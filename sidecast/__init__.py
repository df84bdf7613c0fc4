"""sidecast: nowcasting for distributed training, as a sidecar that never stalls it.

``import sidecast; engine = sidecast.attach(engine)`` is all that a DeepSpeed script needs, ``sidecast.attach(model,
optimizer)`` all that a plain loop does (FSDP2, DDP or one process); ``NowcastCallback`` is for the Hugging Face
Trainer, ``LightningNowcastCallback`` for Lightning, ``NowcastOptimizer`` for one-process scripts without a service.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sidecast.errors import ConfigError as ConfigError

if TYPE_CHECKING:
    from sidecast.trainer.hook.reporting import NowcastEvent as NowcastEvent
    from sidecast.trainer.integrations.attach import attach as attach
    from sidecast.trainer.integrations.attach import hook_of as hook_of
    from sidecast.trainer.integrations.attach import resume_nowcasting as resume_nowcasting
    from sidecast.trainer.integrations.attach import save_nowcasting as save_nowcasting
    from sidecast.trainer.integrations.huggingface import NowcastCallback as NowcastCallback
    from sidecast.trainer.integrations.lightning import LightningNowcastCallback as LightningNowcastCallback
    from sidecast.trainer.integrations.optimizer import NowcastOptimizer as NowcastOptimizer

__all__ = [
    "ConfigError",
    "LightningNowcastCallback",
    "NowcastCallback",
    "NowcastEvent",
    "NowcastOptimizer",
    "attach",
    "hook_of",
    "resume_nowcasting",
    "save_nowcasting",
]

# Lazy, because the service and the courier import this package without torch or DeepSpeed.
_HOMES = {
    "attach": ("sidecast.trainer.integrations.attach", "trainer"),
    "hook_of": ("sidecast.trainer.integrations.attach", "trainer"),
    "resume_nowcasting": ("sidecast.trainer.integrations.attach", "trainer"),
    "save_nowcasting": ("sidecast.trainer.integrations.attach", "trainer"),
    "NowcastEvent": ("sidecast.trainer.hook.reporting", "trainer"),
    "NowcastCallback": ("sidecast.trainer.integrations.huggingface", "huggingface"),
    "LightningNowcastCallback": ("sidecast.trainer.integrations.lightning", "lightning"),
    "NowcastOptimizer": ("sidecast.trainer.integrations.optimizer", "trainer"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home, extra = _HOMES[name]
    try:
        return getattr(import_module(home), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"sidecast.{name} needs {error.name}; pip install 'sidecast[{extra}]' brings it", name=error.name
        ) from error
