"""What the hook may ask of whoever brings it predictions: a courier process, or this process itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sidecast.trainer.hook.slots import Slot
from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.messages import (
    Committed,
    Connected,
    Disconnected,
    Dropped,
    Failed,
    PauseChanged,
    Prediction,
    Refused,
    Report,
    Sent,
    Snapshot,
    Stats,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Died:
    """The courier ended, and was replaced if it could be."""

    reason: str


FromHook = Snapshot | Report | Stats
ForHook = Connected | PauseChanged | Disconnected | Refused | Died | Sent | Committed | Dropped | Prediction | Failed


class Messenger(Protocol):
    """Takes snapshots, brings predictions; no call waits for a network.

    Attributes:
        slots: Staging slots of this rank's upload shards.
        prediction: Buffer of this rank's owned shards, fp32.
        held: The prediction that lies whole in that buffer, from its message on until it is released; None if there
            is none.
        num_deaths: How often it had to be replaced.
    """

    held: Prediction | None

    @property
    def slots(self) -> Sequence[Slot]: ...

    @property
    def prediction(self) -> SharedBuffer: ...

    @property
    def num_deaths(self) -> int: ...

    @property
    def session_id(self) -> str:
        """The session that its predictions belong to."""

    @property
    def has_free_slot(self) -> bool:
        """Whether ``take_slot`` would give one."""

    def take_slot(self) -> Slot | None:
        """A staging slot to fill, to be posted as a snapshot or freed; None if all are needed."""

    def post(self, message: FromHook, *, may_be_lost: bool = False) -> bool:
        """Tells it something without waiting; False if it could not be told, and a snapshot's slot is free again."""

    def receive(self, timeout_s: float = 0.0) -> Iterator[ForHook]:
        """Yields what it has to tell.

        Args:
            timeout_s: How long to wait for the first message.
        """

    def release_prediction(self, record: Mapping[str, Any] | None) -> None:
        """Gives the prediction buffer back; ``record`` is for the apply log if the prediction was applied."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds an entry to the apply log."""

    def close(self) -> None:
        """Ends it and frees its memory."""
