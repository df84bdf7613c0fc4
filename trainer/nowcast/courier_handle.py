"""The trainer's side of the courier: starts it, hands it snapshots, hears from it, replaces it when it dies."""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from sidecast.trainer.nowcast.buffers import SharedBuffer
from sidecast.trainer.nowcast.channel import Channel, ChannelClosedError, Message
from sidecast.trainer.nowcast.config import courier_environment

log = logging.getLogger(__name__)

NUM_SLOTS = 2
END_TIMEOUT_S = 2.0
MAX_RESTARTS = 5


class CourierHandle:
    """One rank's courier and the memory shared with it.

    Args:
        hello: What the courier must know, but the descriptors and sizes of the buffers.
        upload_bytes: Size of a staging slot.
        fetch_bytes: Size of the prediction buffer.
    """

    def __init__(self, hello: Mapping[str, Any], upload_bytes: int, fetch_bytes: int) -> None:
        self.slots = [SharedBuffer(f"staging-{index}", upload_bytes) for index in range(NUM_SLOTS)]
        self.prediction = SharedBuffer("prediction", fetch_bytes)
        self.num_deaths = 0
        self.prediction_is_held = False
        self._hello = {
            **hello,
            "upload_bytes": upload_bytes,
            "fetch_bytes": fetch_bytes,
            "slot_descriptors": [slot.descriptor for slot in self.slots],
            "prediction_descriptor": self.prediction.descriptor,
        }
        self._free_slots = list(range(NUM_SLOTS))
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._last_status: int | None = None

    def start(self) -> None:
        """Starts the courier process and introduces this rank to it."""
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sidecast.trainer.nowcast.courier", str(theirs.fileno())],
            pass_fds=[theirs.fileno(), self.prediction.descriptor, *(slot.descriptor for slot in self.slots)],
            stdin=subprocess.DEVNULL,
            env=courier_environment(),
        )
        theirs.close()
        self._channel = Channel(ours)
        with contextlib.suppress(ChannelClosedError):
            # A prediction that the trainer still holds outlives the courier that fetched it.
            self._channel.send({**self._hello, "prediction_is_held": self.prediction_is_held})
        self._channel.set_blocking(False)
        self._free_slots = list(range(NUM_SLOTS))

    def take_slot(self) -> int | None:
        """A staging slot that the courier does not need any more; None while it needs all."""
        return self._free_slots.pop() if self._free_slots else None

    def return_slot(self, slot: int) -> None:
        """Gives back a slot that was not handed to the courier."""
        self._free_slots.append(slot)

    def post(self, message: Message) -> bool:
        """Tells the courier something without waiting; False if it could not be told."""
        if self._channel is None:
            return False
        try:
            return self._channel.post(message)
        except ChannelClosedError:
            self._bury()
            return False

    def release_prediction(self, record: Mapping[str, Any] | None) -> None:
        """Gives the prediction buffer back, to be overwritten.

        Args:
            record: Entry of the apply log if the prediction was applied; the courier adds the delta.
        """
        self.prediction_is_held = False
        self.post({"type": "release", "record": record})

    def new_session(self, session: Mapping[str, Any]) -> None:
        """Makes the courier open another session; a courier started later opens that one, too."""
        self._hello["session"] = session
        self.post({"type": "session", "session": session})

    def receive(self, timeout_s: float = 0.0) -> Iterator[Message]:
        """Yields what the courier has said.

        Args:
            timeout_s: How long to wait for the first message.
        """
        if self._channel is None:
            return
        if timeout_s > 0:
            self._channel.wait_readable(timeout_s)
        try:
            for message in self._channel.receive():
                if message["type"] == "sent":
                    self._free_slots.append(message["slot"])
                elif message["type"] == "prediction":
                    self.prediction_is_held = True
                elif message["type"] == "metrics":
                    log.info("rank %d serves metrics on port %d", self._hello["rank"], message["port"])
                yield message
        except ChannelClosedError:
            self._bury()
            yield {"type": "died", "reason": f"the courier ended with status {self._last_status}"}

    def _bury(self) -> None:
        """Takes note of a courier's death and starts another; nothing of the training run depends on it."""
        if self._channel is None or self._process is None:
            return
        self.num_deaths += 1
        self._channel.close()
        self._channel = None
        self._last_status = self._process.poll()
        if self.num_deaths <= MAX_RESTARTS:
            log.warning("the courier died (status %s); starting another", self._last_status)
            self.start()
        else:
            log.error("the courier died %d times; nowcasting is off for the rest of the run", self.num_deaths)

    def close(self) -> None:
        """Ends the courier and frees the shared memory."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._process is not None:
            try:
                self._process.wait(END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        for buffer in (*self.slots, self.prediction):
            buffer.close()
        self.slots = []
