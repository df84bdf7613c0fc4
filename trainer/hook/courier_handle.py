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
from typing import Any, assert_never

from sidecast.protos.transport import BULK_ENVIRONMENT
from sidecast.trainer.hook.messenger import Died, ForHook
from sidecast.trainer.hook.slots import FP32_BYTES, Slot, SlotState, has_free, take_free
from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.channel import Channel, ChannelClosedError
from sidecast.trainer.pipe.encoding import MessageError
from sidecast.trainer.pipe.messages import (
    TO_HOOK,
    BeginSession,
    Committed,
    Confirmed,
    Connected,
    CourierSettings,
    Disconnected,
    Dropped,
    Failed,
    Hello,
    Log,
    MetricsServed,
    PauseChanged,
    Prediction,
    Refused,
    Release,
    Sent,
    Session,
    Shard,
    Snapshot,
    ToCourier,
    ToHook,
)

log = logging.getLogger(__name__)

END_TIMEOUT_S = 2.0
# To write the last applied delta, which may be large and the disk slow.
RECORD_TIMEOUT_S = 30.0
# Without a prediction brought in between: over weeks couriers may die more often, one that always dies helps nobody.
MAX_DEATHS_IN_A_ROW = 5


_channels: weakref.WeakSet[Channel[ToCourier, ToHook]] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked data loader would otherwise keep the channel open, and the courier alive, after its trainer is gone.
    for channel in _channels:
        channel.close()


os.register_at_fork(after_in_child=_close_in_child)


class CourierHandle:
    """One rank's courier and the memory shared with it.

    Args:
        settings: What holds for every courier of this rank.
        session: To be opened.
        num_slots: Number of staging slots.

    Attributes:
        slots: The staging slots.
        prediction: The prediction buffer.
        held: The prediction that lies whole in it; it outlives the courier that brought it.
        num_deaths: How many couriers had to be replaced.
        session: That the courier keeps open, or tries to.
    """

    def __init__(self, settings: CourierSettings, session: Session, num_slots: int) -> None:
        with contextlib.ExitStack() as undo:

            def reserve(name: str, shards: tuple[Shard, ...]) -> SharedBuffer:
                buffer = SharedBuffer(name, FP32_BYTES * sum(stop - start for _, start, stop in shards))
                undo.callback(buffer.close)
                return buffer

            self.slots = [
                Slot(index, reserve(f"staging-{index}", settings.upload_shards)) for index in range(num_slots)
            ]
            self.prediction = reserve("prediction", settings.fetch_shards)
            undo.pop_all()
        self.held: Prediction | None = None
        self.num_deaths = 0
        self.session = session
        self._settings = settings
        self._num_deaths_in_a_row = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: Channel[ToCourier, ToHook] | None = None
        self._last_status: int | None = None
        self._unconfirmed: deque[Release | Log] = deque()
        self._untold_deaths: deque[Died] = deque()

    @property
    def is_alive(self) -> bool:
        """Whether there is a courier, or another one was started in its place."""
        return self._channel is not None

    def start(self) -> None:
        """Starts the courier process and introduces this rank to it; never waits for it."""
        ours, theirs = socket.socketpair()
        try:
            self._process = subprocess.Popen(
                # Nothing of the working directory's: a queue.py there is the user's, and not what the courier imports.
                [sys.executable, "-P", "-m", "sidecast.trainer.courier", str(theirs.fileno())],
                pass_fds=[theirs.fileno(), self.prediction.descriptor, *self._slot_descriptors],
                stdin=subprocess.DEVNULL,
                env=courier_environment(),
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._channel = Channel[ToCourier, ToHook](ours, TO_HOOK)
        self._channel.set_blocking(False)
        _channels.add(self._channel)
        for slot in self.slots:
            # What the courier before was to send is lost.
            if slot.state is SlotState.POSTED:
                slot.free()
        # A prediction that the trainer still holds, or that is still to be recorded, outlives the courier that
        # fetched it, and so does every entry of the apply log that it has not confirmed.
        is_recorded = not any(isinstance(item, Release) for item in self._unconfirmed)
        hello = Hello(
            settings=self._settings,
            session=self.session,
            slot_descriptors=self._slot_descriptors,
            prediction_descriptor=self.prediction.descriptor,
            prediction_is_held=self.held is not None or not is_recorded,
        )
        with contextlib.suppress(ChannelClosedError):
            for message in (hello, *self._unconfirmed):
                self._channel.post(message)

    @property
    def _slot_descriptors(self) -> tuple[int, ...]:
        return tuple(slot.buffer.descriptor for slot in self.slots)

    @property
    def session_id(self) -> str:
        """Of the session that predictions belong to."""
        return self.session.session_id

    @property
    def has_free_slot(self) -> bool:
        """Whether the courier does without one of the staging slots."""
        return has_free(self.slots)

    def take_slot(self) -> Slot | None:
        """A staging slot that the courier does not need any more; None while it needs all."""
        return take_free(self.slots)

    def post(self, message: ToCourier, *, may_be_lost: bool = False) -> bool:
        """Tells the courier something without waiting; False if it could not be told."""
        is_posted = False
        try:
            if self._channel is not None:
                is_posted = self._channel.post(message, may_be_lost=may_be_lost)
        except ChannelClosedError:
            self._replace_dead()
        if isinstance(message, Snapshot):
            self.slots[message.slot].state = SlotState.POSTED if is_posted else SlotState.FREE
        return is_posted

    def release_prediction(self, record: Mapping[str, Any] | None) -> None:
        """Gives the prediction buffer back, to be overwritten.

        Args:
            record: Entry of the apply log if the prediction was applied; the courier adds the delta.
        """
        self.held = None
        self._post_until_confirmed(Release(record=record))

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds an entry to the apply log."""
        self._post_until_confirmed(Log(record=record))

    def _post_until_confirmed(self, message: Release | Log) -> None:
        # Kept until the courier says that it is done: the next one is told otherwise.
        self._unconfirmed.append(message)
        self.post(message)

    def new_session(self, session: Session) -> None:
        """Makes the courier open another session; a courier started later opens that one, too."""
        self.session = session
        self.post(BeginSession(session=session))

    def receive(self, timeout_s: float = 0.0) -> Iterator[ForHook]:
        """Yields what the courier has said.

        Args:
            timeout_s: How long to wait for the first message.
        """
        channel = self._channel
        if channel is None or self._untold_deaths:
            yield from self._take_deaths()
            return
        try:
            if timeout_s > 0:
                channel.wait_readable(timeout_s)
            for message in channel.receive():
                if self._channel is not channel:
                    # Whoever took the last one has answered, and found the courier dead. The next one was told all
                    # that was not confirmed, and does not know what the dead one brought or sent.
                    break
                match message:
                    case Confirmed():
                        self._unconfirmed.popleft()
                    case MetricsServed(port=port):
                        log.info("rank %d serves metrics on port %d", self._settings.rank, port)
                    case Sent(slot=slot):
                        self.slots[slot].free()
                        yield message
                    case Prediction():
                        self.held = message
                        self._num_deaths_in_a_row = 0
                        yield message
                    case Connected() | PauseChanged() | Disconnected() | Refused() | Committed() | Dropped() | Failed():
                        yield message
                    case _:
                        assert_never(message)
        except (ChannelClosedError, MessageError) as error:
            # Unless a post in between has noticed first: the one that is there now is then another.
            if self._channel is channel:
                if isinstance(error, MessageError):
                    log.error("the courier is not of the hook's version: %s", error)
                self._replace_dead()
        yield from self._take_deaths()

    def _take_deaths(self) -> Iterator[Died]:
        while self._untold_deaths:
            yield self._untold_deaths.popleft()

    def _replace_dead(self) -> None:
        """Takes note of a courier's death and starts another; nothing of the training run depends on it."""
        if self._channel is None or self._process is None:
            return
        self.num_deaths += 1
        self._num_deaths_in_a_row += 1
        self._channel.close()
        self._channel = None
        # It closed its end, so it is dead or of no use; it must not write to a buffer that the next one fills.
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._last_status = self._process.wait(END_TIMEOUT_S)
        # Told with the next messages, whoever has noticed: a post that failed tells nobody.
        self._untold_deaths.append(Died(reason=f"the courier ended with status {self._last_status}"))
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
        for slot in self.slots:
            slot.close()
        self.prediction.close()
        self.slots = []


def courier_environment() -> dict[str, str]:
    """What a courier inherits: paths and locale. It needs no device, and no rank variables of the launcher."""
    kept = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "LANG", "LC_ALL", "HOME", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | BULK_ENVIRONMENT
