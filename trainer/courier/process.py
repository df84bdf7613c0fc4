"""The courier: one plain process per rank that does all networking, without torch and outside the trainer's GIL.

It is told everything over a channel, moves bytes between shared buffers and the service, and ends when the
channel does. Started as ``python -m sidecast.trainer.courier DESCRIPTOR``.

Threads: the main one reads the channel; the link, the sender and the fetcher have one each.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, assert_never

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.shards import ShardSpec, total_elements
from sidecast.trainer.courier.client import NowcastClient, open_request
from sidecast.trainer.courier.fetcher import Fetcher
from sidecast.trainer.courier.link import Link
from sidecast.trainer.courier.reconstruction import FP32_BYTES, Reconstruction
from sidecast.trainer.courier.sender import Sender
from sidecast.trainer.courier.snapshot_outcomes import SnapshotOutcomes
from sidecast.trainer.courier.unserved_metrics import Metrics, UnservedMetrics
from sidecast.trainer.courier.uploader import Uploader
from sidecast.trainer.pipe.apply_log import Recorder
from sidecast.trainer.pipe.buffers import map_inherited
from sidecast.trainer.pipe.channel import Channel, ChannelClosedError
from sidecast.trainer.pipe.encoding import MessageError
from sidecast.trainer.pipe.messages import (
    TO_COURIER,
    BeginSession,
    Committed,
    Confirmed,
    CourierSettings,
    Dropped,
    Failed,
    Hello,
    Log,
    MetricsServed,
    PauseChanged,
    Release,
    Report,
    Session,
    Snapshot,
    Stats,
    ToCourier,
    ToHook,
)

log = logging.getLogger(__name__)

# Below the time that a closing rank gives its courier to end.
DRAIN_TIMEOUT_S = 1.5


class Courier:
    """Everything one courier process knows.

    Args:
        channel: To the training rank.
        hello: The rank's first message: who it is, what it holds, where the service is.
    """

    def __init__(self, channel: Channel[ToHook, ToCourier], hello: Hello) -> None:
        settings, session = hello.settings, hello.session
        upload_shards = [ShardSpec(*shard) for shard in settings.upload_shards]
        fetch_shards = [ShardSpec(*shard) for shard in settings.fetch_shards]
        upload_bytes, fetch_bytes = (FP32_BYTES * total_elements(shards) for shards in (upload_shards, fetch_shards))
        self._channel = channel
        self._send_lock = threading.Lock()
        self._is_ending = False
        self._rank = settings.rank
        self._metrics_port = settings.metrics_port
        self._metrics = _metrics(settings)
        self._metrics.begin_session(session.run_id)
        self._recorder = Recorder(settings.record_dir, self._rank) if settings.record_dir else None
        self._prediction = map_inherited(hello.prediction_descriptor, fetch_bytes)
        slots = [map_inherited(descriptor, upload_bytes) for descriptor in hello.slot_descriptors]
        descriptors = (*hello.slot_descriptors, hello.prediction_descriptor)
        shared = descriptors if settings.shared_memory == "auto" else ()
        client = NowcastClient(settings.client, shared)
        sends_changes = settings.wire_dtype == "bf16_delta"
        self._outcomes = SnapshotOutcomes()
        self._link = Link(
            client,
            self._rank,
            (upload_shards, fetch_shards),
            None if settings.opening is None else functools.partial(announcement, settings),
            session,
            tell=self._tell,
            on_event=self._on_event,
        )
        uploader = Uploader(
            client,
            self._rank,
            slots,
            self._link,
            self._outcomes,
            self._metrics,
            self._tell,
            Reconstruction(upload_bytes) if sends_changes else None,
        )
        self._sender = Sender(client, self._rank, self._link, uploader)
        self._fetcher = Fetcher(
            client,
            self._rank,
            self._prediction,
            self._link,
            self._metrics,
            self._tell,
            dtype=pb.BF16 if sends_changes else pb.FP32,
            is_held=hello.prediction_is_held,
        )

    def run(self) -> None:
        """Serves the rank until it closes the channel."""
        port = self._serve_metrics()
        self._resume_record(self._link.session)
        self._metrics.follow_link(lambda: self._link.is_connected)
        self._start(self._link.run, "link")
        outgoing = self._start(self._sender.run, "outgoing")
        self._start(self._fetcher.run, "incoming")
        if port is not None:
            self._tell(MetricsServed(port=port))
        for message in self._channel.receive():
            match message:
                case Snapshot() | Report():
                    self._sender.put(self._link.session.session_id, message)
                case Release(record=record):
                    self._record(record, self._prediction)
                    self._fetcher.release()
                case Log(record=record):
                    self._record(record, None)
                case Stats():
                    self._metrics.update(message)
                case BeginSession(session=session):
                    self._begin_session(session)
                case Hello():
                    raise MessageError("a rank introduces itself to its courier once")
                case _:
                    assert_never(message)
        self._is_ending = True
        # What was staged last, often together with a checkpoint, is what a resumed run needs first.
        self._sender.end()
        outgoing.join(DRAIN_TIMEOUT_S)
        self._link.end()

    def _start(self, work: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
        thread.start()
        return thread

    def _guarded(self, work: Callable[[], None]) -> None:
        """A thread's failure is the process's: the trainer sees its courier die, counts it, and goes on."""
        try:
            work()
        except ChannelClosedError:
            pass
        except BaseException:
            log.exception("the courier of rank %d failed", self._rank)
            sys.stderr.flush()
            signal.raise_signal(signal.SIGKILL)

    def _tell(self, message: ToHook) -> None:
        try:
            with self._send_lock:
                self._channel.send(message)
        except ChannelClosedError:
            if not self._is_ending:
                raise

    def _serve_metrics(self) -> int | None:
        try:
            return self._metrics.serve(self._metrics_port)
        except OSError as error:
            log.error("rank %d: no metrics on port %s: %s", self._rank, self._metrics_port, error.strerror)
            return None

    # --- the session

    def _begin_session(self, session: Session) -> None:
        self._link.begin(session)
        self._metrics.begin_session(session.run_id)
        self._resume_record(session)

    def _on_event(self, session_id: str, event: pb.SessionEvent) -> None:
        match event.WhichOneof("event"):
            case "committed":
                self._outcomes.commit(session_id, event.committed.epoch, event.committed.step)
                self._metrics.count_snapshot("committed")
                self._tell(Committed(step=event.committed.step))
            case "aborted":
                # Not if this rank could not send its part: that loss has been counted.
                if self._outcomes.lose(session_id, event.aborted.epoch, event.aborted.step):
                    self._metrics.count_snapshot("aborted")
                    self._tell(Dropped(step=event.aborted.step, reason=event.aborted.reason))
            case "published":
                self._fetcher.put(session_id, event.published)
            case "pause":
                self._tell(PauseChanged(is_paused=event.pause.is_paused))
            case "failed":
                self._tell(Failed(step=event.failed.base_step, reason=event.failed.reason))

    # --- the apply log

    def _record(self, entry: Mapping[str, Any] | None, delta: memoryview | None) -> None:
        if self._recorder is not None and entry is not None:
            try:
                self._recorder.record(entry, delta, self._link.session)
            except OSError as error:
                log.error(
                    "rank %d: the run can no longer be replayed, its apply log lacks step %s: %s",
                    self._rank,
                    entry["step"],
                    error,
                )
        # The trainer ends without reading all; what it asked to be recorded is recorded nevertheless.
        with contextlib.suppress(ChannelClosedError):
            self._tell(Confirmed())

    def _resume_record(self, session: Session) -> None:
        # Not at a fresh session: a run that is about to load a checkpoint has one first.
        if self._recorder is not None and session.resumed:
            try:
                self._recorder.resume(session)
            except OSError as error:
                log.error("rank %d: the apply log keeps jumps that the resume gave up: %s", self._rank, error)


def _metrics(settings: CourierSettings) -> Metrics:
    if settings.metrics_port is None:
        return UnservedMetrics()
    # Not above: it brings a fifth of all that a courier loads, which no other rank has a use for.
    from sidecast.trainer.courier.metrics import CourierMetrics

    return CourierMetrics(settings.run_name, settings.rank, settings.stage)


def announcement(settings: CourierSettings, session: Session) -> pb.OpenRequest:
    """What rank 0 asks the service to open: every field of its ``Opening`` and of the session but the
    secret, by its name."""
    assert settings.opening is not None
    fields = asdict(settings.opening) | asdict(session)
    # Of every call's metadata, not of the announcement.
    del fields["run_secret"]
    fields["wire_dtype"] = "BF16" if settings.wire_dtype == "bf16_delta" else "FP32"
    parameters, config_json = fields.pop("parameters"), fields.pop("config_json")
    return open_request(fields, parameters, config_json)


def main(descriptor: int) -> None:
    """Runs a courier on an inherited socket."""
    # Ctrl-C reaches the whole process group; the courier ends with its rank's channel instead.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="sidecast courier: %(message)s")
    channel = Channel[ToHook, ToCourier](socket.socket(fileno=descriptor), TO_COURIER)
    try:
        hello = next(channel.receive())
        if not isinstance(hello, Hello):
            raise MessageError(f"a rank introduces itself to its courier first, not with {type(hello).__name__}")
        Courier(channel, hello).run()
    except MessageError as error:
        sys.exit(f"sidecast courier: {error}")
