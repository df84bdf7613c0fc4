"""What the hook may ask of whoever brings it predictions: a courier process, or this process itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.messages import Message


class Messenger(Protocol):
    """Takes snapshots, brings predictions; no call waits for a network.

    Attributes:
        slots: Staging buffers of this rank's upload shards, fp32.
        prediction: Buffer of this rank's owned shards, fp32.
        num_deaths: How often it had to be replaced.
    """

    @property
    def slots(self) -> Sequence[SharedBuffer]: ...

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

    def take_slot(self) -> int | None:
        """A staging slot to fill; None if all are needed."""

    def return_slot(self, slot: int) -> None:
        """Gives back a slot that was not posted as a snapshot."""

    def post(self, message: Message, *, may_be_lost: bool = False) -> bool:
        """Tells it something without waiting; False if it could not be told."""

    def receive(self, timeout_s: float = 0.0) -> Iterator[Message]:
        """Yields what it has said.

        Args:
            timeout_s: How long to wait for the first message.
        """

    def release_prediction(self, record: Mapping[str, Any] | None) -> None:
        """Gives the prediction buffer back; ``record`` is for the apply log if the prediction was applied."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds an entry to the apply log."""

    def close(self) -> None:
        """Ends it and frees its memory."""
