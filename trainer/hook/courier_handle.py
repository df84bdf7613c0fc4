"""The trainer's side of the courier: starts it, hands it snapshots, hears from it, replaces it when it dies."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from sidecast.protos.transport import BULK_ENVIRONMENT
from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.channel import Channel, ChannelClosedError
from sidecast.trainer.pipe.messages import Message

log = logging.getLogger(__name__)

END_TIMEOUT_S = 2.0
# To write the last applied delta, which may be large and the disk slow.
RECORD_TIMEOUT_S = 30.0
# Without a prediction brought in between: over weeks couriers may die more often, one that always dies helps nobody.
MAX_DEATHS_IN_A_ROW = 5


_channels: weakref.WeakSet[Channel] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked data loader would otherwise keep the channel open, and the courier alive, after its trainer is gone.
    for channel in _channels:
        channel.close()


os.register_at_fork(after_in_child=_close_in_child)


class CourierHandle:
    """One rank's courier and the memory shared with it.

    Args:
        hello: What the courier must know, but the descriptors and sizes of the buffers.
        upload_bytes: Size of a staging slot.
        fetch_bytes: Size of the prediction buffer.
        num_slots: Number of staging slots.
    """

    def __init__(self, hello: Mapping[str, Any], upload_bytes: int, fetch_bytes: int, num_slots: int) -> None:
        with contextlib.ExitStack() as undo:

            def reserve(name: str, num_bytes: int) -> SharedBuffer:
                buffer = SharedBuffer(name, num_bytes)
                undo.callback(buffer.close)
                return buffer

            self.slots = [reserve(f"staging-{index}", upload_bytes) for index in range(num_slots)]
            self.prediction = reserve("prediction", fetch_bytes)
            undo.pop_all()
        self.num_deaths = 0
        self._num_deaths_in_a_row = 0
        self.prediction_is_held = False
        self._hello = {
            **hello,
            "upload_bytes": upload_bytes,
            "fetch_bytes": fetch_bytes,
            "slot_descriptors": [slot.descriptor for slot in self.slots],
            "prediction_descriptor": self.prediction.descriptor,
        }
        self._free_slots = list(range(len(self.slots)))
        # Taken, and not yet handed over: no courier has them, whichever dies.
        self._filling: set[int] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._last_status: int | None = None
        self._unconfirmed: deque[Message] = deque()
        self._death_notices: deque[Message] = deque()

    @property
    def is_alive(self) -> bool:
        """Whether there is a courier, or another one was started in its place."""
        return self._channel is not None

    def start(self) -> None:
        """Starts the courier process and introduces this rank to it; never waits for it."""
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sidecast.trainer.courier", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), self.prediction.descriptor, *(slot.descriptor for slot in self.slots)],
                stdin=subprocess.DEVNULL,
                env=courier_environment(),
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel = Channel(ours)
        self._channel.set_blocking(False)
        _channels.add(self._channel)
        self._free_slots = [slot for slot in range(len(self.slots)) if slot not in self._filling]
        with contextlib.suppress(ChannelClosedError):
            # A prediction that the trainer still holds, or that is still to be recorded, outlives the courier that
            # fetched it, and so does every entry of the apply log that it has not confirmed.
            is_held = self.prediction_is_held or any(item["type"] == "release" for item in self._unconfirmed)
            self._channel.post({**self._hello, "prediction_is_held": is_held})
            for message in self._unconfirmed:
                self._channel.post(message)

    @property
    def has_free_slot(self) -> bool:
        """Whether the courier does without one of the staging slots."""
        return bool(self._free_slots)

    def take_slot(self) -> int | None:
        """A staging slot that the courier does not need any more; None while it needs all."""
        if not self._free_slots:
            return None
        slot = self._free_slots.pop()
        self._filling.add(slot)
        return slot

    @property
    def session_id(self) -> str:
        """The session that the courier keeps open, or tries to."""
        return str(self._hello["session"]["session_id"])

    def return_slot(self, slot: int) -> None:
        """Gives back a slot that was not handed to the courier."""
        self._filling.discard(slot)
        self._free_slots.append(slot)

    def post(self, message: Message, *, may_be_lost: bool = False) -> bool:
        """Tells the courier something without waiting; False if it could not be told."""
        is_posted = False
        try:
            if self._channel is not None:
                is_posted = self._channel.post(message, may_be_lost=may_be_lost)
        except ChannelClosedError:
            self._replace_dead()
        if message["type"] == "snapshot":
            if is_posted:
                self._filling.discard(message["slot"])
            else:
                self.return_slot(message["slot"])
        return is_posted

    def release_prediction(self, record: Mapping[str, Any] | None) -> None:
        """Gives the prediction buffer back, to be overwritten.

        Args:
            record: Entry of the apply log if the prediction was applied; the courier adds the delta.
        """
        self.prediction_is_held = False
        self._post_until_confirmed({"type": "release", "record": record})

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds an entry to the apply log."""
        self._post_until_confirmed({"type": "log", "record": record})

    def _post_until_confirmed(self, message: Message) -> None:
        # Kept until the courier says that it is done: its successor is told otherwise.
        self._unconfirmed.append(message)
        self.post(message)

    def new_session(self, session: Mapping[str, Any]) -> None:
        """Makes the courier open another session; a courier started later opens that one, too."""
        self._hello["session"] = session
        self.post({"type": "session", "session": session})

    def receive(self, timeout_s: float = 0.0) -> Iterator[Message]:
        """Yields what the courier has said.

        Args:
            timeout_s: How long to wait for the first message.
        """
        channel = self._channel
        if channel is None or self._death_notices:
            yield from self._take_death_notices()
            return
        try:
            if timeout_s > 0:
                channel.wait_readable(timeout_s)
            for message in channel.receive():
                if self._channel is not channel:
                    # Whoever took the last one has answered, and found the courier dead. Its successor was told all
                    # that was not confirmed, and does not know what the dead one brought or sent.
                    break
                if message["type"] == "noted":
                    self._unconfirmed.popleft()
                    continue
                if message["type"] == "sent":
                    self._free_slots.append(message["slot"])
                elif message["type"] == "prediction":
                    self.prediction_is_held = True
                    self._num_deaths_in_a_row = 0
                elif message["type"] == "metrics":
                    log.info("rank %d serves metrics on port %d", self._hello["rank"], message["port"])
                yield message
        except ChannelClosedError:
            # Unless a post in between has noticed first: the one that is there now is then another.
            if self._channel is channel:
                self._replace_dead()
        yield from self._take_death_notices()

    def _take_death_notices(self) -> Iterator[Message]:
        while self._death_notices:
            yield self._death_notices.popleft()

    def _replace_dead(self) -> None:
        """Takes note of a courier's death and starts another; nothing of the training run depends on it."""
        if self._channel is None or self._process is None:
            return
        self.num_deaths += 1
        self._num_deaths_in_a_row += 1
        self._channel.close()
        self._channel = None
        # It closed its end, so it is dead or of no use; it must not write to a buffer that its successor fills.
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._last_status = self._process.wait(END_TIMEOUT_S)
        # Told with the next messages, whoever has noticed: a post that failed tells nobody.
        self._death_notices.append({"type": "died", "reason": f"the courier ended with status {self._last_status}"})
        if self._num_deaths_in_a_row > MAX_DEATHS_IN_A_ROW:
            log.error(
                "the courier died %d times without bringing a prediction; nowcasting is off for the rest of the run",
                self._num_deaths_in_a_row,
            )
            return
        log.warning("the courier died (status %s); starting another", self._last_status)
        try:
            self.start()
        except OSError as error:
            log.error("no other courier can be started (%s); nowcasting is off for the rest of the run", error)

    def close(self) -> None:
        """Ends the courier and frees the shared memory."""
        if self._channel is not None:
            with contextlib.suppress(ChannelClosedError):
                self._channel.finish(END_TIMEOUT_S)
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(RECORD_TIMEOUT_S if self._unconfirmed else END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        for buffer in (*self.slots, self.prediction):
            buffer.close()
        self.slots = []


def courier_environment() -> dict[str, str]:
    """What a courier inherits: paths and locale. It needs no device, and no rank variables of the launcher."""
    kept = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG", "LC_ALL", "HOME", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | BULK_ENVIRONMENT
