"""The courier: one plain process per rank that does all networking, without torch and outside the trainer's GIL.

It is told everything over a channel, moves bytes between shared buffers and the service, and ends when the
channel does. Started as ``python -m sidecast.trainer.courier DESCRIPTOR``.

Threads: the main one reads the channel; the link, the uploader and the fetcher have one each.
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
from typing import Any

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.courier.client import ClientConfig, NowcastClient, open_request
from sidecast.trainer.courier.fetcher import Fetcher
from sidecast.trainer.courier.link import Link
from sidecast.trainer.courier.metrics import CourierMetrics
from sidecast.trainer.courier.reconstruction import Reconstruction
from sidecast.trainer.courier.snapshot_outcomes import SnapshotOutcomes
from sidecast.trainer.courier.uploader import Uploader
from sidecast.trainer.pipe.apply_log import Recorder
from sidecast.trainer.pipe.buffers import map_inherited
from sidecast.trainer.pipe.channel import Channel, ChannelClosedError
from sidecast.trainer.pipe.messages import Message

log = logging.getLogger(__name__)

# Below the time that a closing rank gives its courier to end.
DRAIN_TIMEOUT_S = 1.5


class Courier:
    """Everything one courier process knows.

    Args:
        channel: To the training rank.
        hello: The rank's first message: who it is, what it holds, where the service is.
    """

    def __init__(self, channel: Channel, hello: Message) -> None:
        self._channel = channel
        self._send_lock = threading.Lock()
        self._is_ending = False
        self._rank: int = hello["rank"]
        self._metrics_port: int | None = hello["metrics_port"]
        self._metrics = CourierMetrics(hello["run_name"], self._rank, hello["stage"])
        self._metrics.begin_session(hello["session"]["run_id"])
        self._recorder = Recorder(hello["record_dir"], self._rank) if hello["record_dir"] else None
        self._prediction = map_inherited(hello["prediction_descriptor"], hello["fetch_bytes"])
        slots = [map_inherited(descriptor, hello["upload_bytes"]) for descriptor in hello["slot_descriptors"]]
        descriptors = (*hello["slot_descriptors"], hello["prediction_descriptor"])
        shared = descriptors if hello["shared_memory"] == "auto" else ()
        client = NowcastClient(ClientConfig(**hello["client"]), shared)
        shards = tuple([ShardSpec(*item) for item in hello[name]] for name in ("upload_shards", "fetch_shards"))
        opening = None if hello["opening"] is None else functools.partial(_announcement, hello["opening"])
        sends_changes = hello["wire_dtype"] == "bf16_delta"
        self._outcomes = SnapshotOutcomes()
        self._link = Link(
            client,
            self._rank,
            (shards[0], shards[1]),
            opening,
            hello["session"],
            tell=self._tell,
            on_event=self._on_event,
        )
        self._uploader = Uploader(
            client,
            self._rank,
            slots,
            self._link,
            self._outcomes,
            self._metrics,
            self._tell,
            Reconstruction(hello["upload_bytes"]) if sends_changes else None,
        )
        self._fetcher = Fetcher(
            client,
            self._rank,
            self._prediction,
            self._link,
            self._metrics,
            self._tell,
            dtype=pb.BF16 if sends_changes else pb.FP32,
            is_held=hello["prediction_is_held"],
        )

    def run(self) -> None:
        """Serves the rank until it closes the channel."""
        port = self._serve_metrics()
        self._resume_record(self._link.session)
        self._metrics.follow_link(lambda: self._link.is_connected)
        self._start(self._link.run, "link")
        outgoing = self._start(self._uploader.run, "outgoing")
        self._start(self._fetcher.run, "incoming")
        if port is not None:
            self._tell({"type": "metrics", "port": port})
        for message in self._channel.receive():
            match message["type"]:
                case "snapshot" | "report":
                    self._uploader.put(self._link.session["session_id"], message)
                case "release":
                    self._record(message["record"], self._prediction)
                    self._fetcher.release()
                case "log":
                    self._record(message["record"], None)
                case "stats":
                    self._metrics.update(message["values"])
                case "session":
                    self._begin_session(message["session"])
                case unknown:
                    raise AssertionError(f"the trainer sent a message of unknown type {unknown!r}")
        self._is_ending = True
        # What was staged last, often together with a checkpoint, is what a resumed run needs first.
        self._uploader.end()
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

    def _tell(self, message: Message) -> None:
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

    def _begin_session(self, session: Mapping[str, Any]) -> None:
        self._link.begin(session)
        self._metrics.begin_session(session["run_id"])
        self._resume_record(session)

    def _on_event(self, session_id: str, event: pb.SessionEvent) -> None:
        match event.WhichOneof("event"):
            case "committed":
                self._outcomes.commit(session_id, event.committed.epoch, event.committed.step)
                self._metrics.snapshots.labels(*self._metrics.labels, "committed").inc()
                self._tell({"type": "committed", "step": event.committed.step})
            case "aborted":
                # Not if this rank could not send its part: that loss has been counted.
                if self._outcomes.lose(session_id, event.aborted.epoch, event.aborted.step):
                    self._metrics.snapshots.labels(*self._metrics.labels, "aborted").inc()
                    self._tell({"type": "dropped", "step": event.aborted.step, "reason": event.aborted.reason})
            case "published":
                self._fetcher.put(session_id, event.published)
            case "failed":
                self._tell({"type": "failed", "step": event.failed.base_step, "reason": event.failed.reason})

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
            self._tell({"type": "noted"})

    def _resume_record(self, session: Mapping[str, Any]) -> None:
        # Not at a fresh session: a run that is about to load a checkpoint has one first.
        if self._recorder is not None and session["resumed"]:
            try:
                self._recorder.resume(session)
            except OSError as error:
                log.error("rank %d: the apply log keeps jumps that the resume gave up: %s", self._rank, error)


def _announcement(opening: Mapping[str, Any], session: Mapping[str, Any]) -> pb.OpenRequest:
    return open_request({**opening["fields"], **session}, opening["parameters"], opening["config_json"])


def main(descriptor: int) -> None:
    """Runs a courier on an inherited socket."""
    # Ctrl-C reaches the whole process group; the courier ends with its rank's channel instead.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="sidecast courier: %(message)s")
    channel = Channel(socket.socket(fileno=descriptor))
    hello = next(channel.receive())
    Courier(channel, hello).run()
