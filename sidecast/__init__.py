"""sidecast: nowcasting for distributed training, as a sidecar that never stalls it.

``import sidecast; engine = sidecast.attach(engine)`` is all that a DeepSpeed script needs.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sidecast.trainer.nowcast.attach import attach as attach

__all__ = ["attach"]


def __getattr__(name: str) -> Any:
    # Lazy, because the service and the courier import this package without torch or DeepSpeed.
    if name == "attach":
        from sidecast.trainer.nowcast.attach import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
