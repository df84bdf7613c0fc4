"""The courier: one plain process per rank that does all networking, without torch and outside the trainer's GIL.

It is told everything over a channel, moves bytes between shared buffers and the service, and ends when the
channel does. Started as ``python -m sidecast.trainer.nowcast.courier DESCRIPTOR``.

Threads: the main one reads the channel, ``link`` keeps the session open and watches it, ``outgoing`` uploads
snapshots and reports in the order in which they happened, ``incoming`` fetches predictions.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from sidecast.errors import SidecastError
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.nowcast.buffers import map_inherited
from sidecast.trainer.nowcast.channel import Channel, ChannelClosedError, Message
from sidecast.trainer.nowcast.client import (
    ClientConfig,
    CorruptError,
    EventStream,
    NowcastClient,
    OutdatedError,
    RefusedError,
    ReopenError,
    UnavailableError,
    open_request,
)
from sidecast.trainer.nowcast.metrics import CourierMetrics
from sidecast.trainer.nowcast.record import Recorder

log = logging.getLogger(__name__)

# Below the time that a closing rank gives its courier to end.
DRAIN_TIMEOUT_S = 1.5
MAX_ATTEMPTS = 3
FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0
FINITE_BLOCK = 1 << 20


class Courier:
    """Everything one courier process knows.

    Args:
        channel: To the training rank.
        hello: The rank's first message: who it is, what it holds, where the service is.
    """

    def __init__(self, channel: Channel, hello: Message) -> None:
        self._channel = channel
        self._send_lock = threading.Lock()
        self._rank: int = hello["rank"]
        self._hello = hello
        self._client = NowcastClient(ClientConfig(**hello["client"]))
        self._upload_shards = [ShardSpec(*item) for item in hello["upload_shards"]]
        self._fetch_shards = [ShardSpec(*item) for item in hello["fetch_shards"]]
        self._slots = [map_inherited(fd, hello["upload_bytes"]) for fd in hello["slot_descriptors"]]
        self._prediction = map_inherited(hello["prediction_descriptor"], hello["fetch_bytes"])
        self._metrics = CourierMetrics(hello["run_name"], self._rank, hello["stage"])
        self._metrics.begin_session(hello["session"]["run_id"])
        self._recorder = Recorder(hello["record_dir"], self._rank) if hello["record_dir"] else None
        # The session to keep open and the watch on it; a resume replaces the one and ends the other, under the lock.
        # `_changed` wakes the link thread where it is not watching.
        self._session_lock = threading.Lock()
        self._session: Mapping[str, Any] = hello["session"]
        self._events: EventStream | None = None
        self._changed = threading.Event()
        self._is_connected = threading.Event()
        self._is_ending = threading.Event()
        # With the session that they belong to: nothing of a run's earlier session may reach a later one.
        self._outgoing: queue.SimpleQueue[tuple[str, Message]] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[tuple[str, pb.PredictionPublished]] = queue.SimpleQueue()
        self._buffer_is_free = threading.Semaphore(0 if hello["prediction_is_held"] else 1)
        self._newest: tuple[str, int, int] | None = None

    def run(self) -> None:
        """Serves the rank until it closes the channel."""
        port = self._serve_metrics()
        self._resume_record(self._session)
        threads = {
            name: threading.Thread(target=self._guarded, args=(work,), name=name, daemon=True)
            for name, work in (("link", self._link), ("outgoing", self._send_all), ("incoming", self._fetch_all))
        }
        for thread in threads.values():
            thread.start()
        if port is not None:
            self._tell({"type": "metrics", "port": port})
        for message in self._channel.receive():
            match message["type"]:
                case "snapshot" | "report":
                    self._outgoing.put((self._session["session_id"], message))
                case "release":
                    self._record(message["record"], self._prediction)
                    self._buffer_is_free.release()
                case "log":
                    self._record(message["record"], None)
                case "stats":
                    self._metrics.update(message["values"])
                case "session":
                    self._begin_session(message["session"])
                case unknown:
                    raise AssertionError(f"the trainer sent a message of unknown type {unknown!r}")
        self._is_ending.set()
        # What was staged last, often together with a checkpoint, is what a resumed run needs first.
        self._outgoing.put(("", {"type": "end"}))
        threads["outgoing"].join(DRAIN_TIMEOUT_S)
        self._changed.set()

    def _serve_metrics(self) -> int | None:
        try:
            return self._metrics.serve(self._hello["metrics_port"])
        except OSError as error:
            log.error("rank %d: no metrics on port %s: %s", self._rank, self._hello["metrics_port"], error.strerror)
            return None

    def _record(self, entry: Mapping[str, Any] | None, delta: memoryview | None) -> None:
        if self._recorder is not None and entry is not None:
            try:
                self._recorder.record(entry, delta, self._session)
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

    def _begin_session(self, session: Mapping[str, Any]) -> None:
        with self._session_lock:
            self._session = session
            self._is_connected.clear()
            if self._events is not None:
                # The watch may not hear anything for hours; it would keep the link thread from the new session.
                self._events.cancel()
        self._metrics.begin_session(session["run_id"])
        self._resume_record(session)
        self._changed.set()

    def _guarded(self, work: Any) -> None:
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
            if not self._is_ending.is_set():
                raise

    # --- link: open, join, watch, and again

    def _link(self) -> None:
        backoff_s = FIRST_BACKOFF_S
        reported = ""
        while not self._is_ending.is_set():
            self._changed.clear()
            session = self._session
            try:
                self._client.wait_reachable()
                if self._rank == 0:
                    self._client.open(self._open_request(session))
                self._client.join(session["session_id"], self._rank, self._upload_shards, self._fetch_shards)
                with self._session_lock:
                    if self._session is not session:
                        continue
                    self._events = self._client.watch(session["session_id"], self._rank)
                    self._is_connected.set()
                self._metrics.connected.set(1)
                self._tell({"type": "connected", "session_id": session["session_id"]})
                backoff_s, reported = FIRST_BACKOFF_S, ""
                self._watch(session["session_id"], self._events)
            except RefusedError as error:
                self._tell({"type": "refused", "reason": str(error)})
                self._changed.wait()
            except ReopenError as error:
                # Rank 0 has not opened the session yet, or the service was restarted: soon it will be there.
                log.debug("rank %d: %s", self._rank, error)
            except (UnavailableError, CorruptError, OutdatedError) as error:
                if reported != str(error) and self._session is session:
                    reported = str(error)
                    self._tell({"type": "disconnected", "reason": reported})
            self._is_connected.clear()
            self._metrics.connected.set(0)
            self._changed.wait(timeout=backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _open_request(self, session: Mapping[str, Any]) -> pb.OpenRequest:
        opening = self._hello["opening"]
        return open_request({**opening["fields"], **session}, opening["parameters"], opening["config_json"])

    def _watch(self, session_id: str, events: EventStream) -> None:
        for event in events:
            if self._session["session_id"] != session_id:
                return
            match event.WhichOneof("event"):
                case "committed":
                    self._metrics.snapshots.labels(*self._metrics.labels, "committed").inc()
                    self._tell({"type": "committed", "step": event.committed.step})
                case "aborted":
                    self._metrics.snapshots.labels(*self._metrics.labels, "aborted").inc()
                    self._tell({"type": "dropped", "step": event.aborted.step, "reason": event.aborted.reason})
                case "published":
                    self._incoming.put((session_id, event.published))
                case "failed":
                    self._tell({"type": "failed", "step": event.failed.base_step, "reason": event.failed.reason})

    # --- outgoing: snapshots and reports, in order

    def _send_all(self) -> None:
        while True:
            session_id, message = self._outgoing.get()
            if message["type"] == "end":
                return
            if message["type"] == "report":
                self._report(session_id, message)
            else:
                self._upload(session_id, message)

    def _report(self, session_id: str, message: Message) -> None:
        fields = {key: value for key, value in message.items() if key not in ("type", "outcome")}
        request = pb.ReportRequest(session_id=session_id, rank=self._rank, outcome=message["outcome"].upper(), **fields)
        try:
            if self._is_connected.is_set():
                self._client.report(request)
        except SidecastError as error:
            # The epoch also travels with every chunk: a lost report costs a count, nothing else.
            log.warning("rank %d: the report of step %d was not taken: %s", self._rank, message["step"], error)

    def _upload(self, session_id: str, message: Message) -> None:
        slot, step = message["slot"], message["step"]
        started_s = time.perf_counter()
        reason = "not connected"
        for _ in range(MAX_ATTEMPTS if self._is_connected.is_set() else 0):
            key = pb.ChunkKey(session_id=session_id, rank=self._rank, id=step, epoch=message["epoch"])
            try:
                self._client.upload(key, self._slots[slot])
                reason = ""
                break
            except CorruptError as error:
                reason = str(error)
            except SidecastError as error:
                reason = str(error)
                break
        seconds = time.perf_counter() - started_s
        if reason:
            self._metrics.snapshots.labels(*self._metrics.labels, "unsent").inc()
        else:
            self._metrics.uploaded_bytes.labels(*self._metrics.labels).inc(len(self._slots[slot]))
            self._metrics.upload_seconds.labels(*self._metrics.labels).observe(seconds)
        self._tell(
            {
                "type": "sent",
                "slot": slot,
                "step": step,
                "seconds": seconds,
                "bytes": 0 if reason else len(self._slots[slot]),
                "reason": reason,
            }
        )

    # --- incoming: predictions

    def _fetch_all(self) -> None:
        while True:
            session_id, published = self._incoming.get()
            identity = (session_id, published.version, published.digest)
            # A reconnected watch begins with the newest prediction, which may be an old acquaintance.
            if identity == self._newest:
                continue
            self._buffer_is_free.acquire()
            if session_id != self._session["session_id"] or not self._incoming.empty():
                # Waiting for the buffer took longer than the prediction lasted.
                self._buffer_is_free.release()
                continue
            self._newest = identity
            started_s = time.perf_counter()
            num_bytes, reason = self._fetch(session_id, published.version)
            seconds = time.perf_counter() - started_s
            if reason:
                self._newest = None
                self._buffer_is_free.release()
                self._tell({"type": "failed", "step": published.base_step, "reason": reason})
                continue
            self._metrics.fetched_bytes.labels(*self._metrics.labels).inc(num_bytes)
            self._metrics.fetch_seconds.labels(*self._metrics.labels).observe(seconds)
            self._tell(
                {
                    "type": "prediction",
                    "session_id": session_id,
                    "version": published.version,
                    "base_step": published.base_step,
                    "epoch": published.epoch,
                    "horizon_intervals": published.horizon_intervals,
                    "digest": published.digest,
                    "relative_norm": published.relative_norm,
                    "nowcast_s": published.nowcast_seconds,
                    "fetch_s": seconds,
                    "bytes": num_bytes,
                }
            )

    def _fetch(self, session_id: str, version: int) -> tuple[int, str]:
        reason = ""
        for _ in range(MAX_ATTEMPTS):
            try:
                num_bytes = self._client.fetch(session_id, self._rank, version, self._prediction)
            except CorruptError as error:
                reason = str(error)
            except SidecastError as error:
                return 0, str(error)
            else:
                return num_bytes, "" if _is_finite(self._prediction) else "the prediction is not finite"
        return 0, reason


def _is_finite(buffer: memoryview) -> bool:
    values = np.frombuffer(buffer, dtype=np.float32)
    # Block by block: the temporary must not double the courier's memory.
    return all(
        bool(np.isfinite(values[start : start + FINITE_BLOCK]).all()) for start in range(0, len(values), FINITE_BLOCK)
    )


def main(descriptor: int) -> None:
    """Runs a courier on an inherited socket."""
    # Ctrl-C reaches the whole process group; the courier ends with its rank's channel instead.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="sidecast courier: %(message)s")
    channel = Channel(socket.socket(fileno=descriptor))
    hello = next(channel.receive())
    Courier(channel, hello).run()


if __name__ == "__main__":
    main(int(sys.argv[1]))
