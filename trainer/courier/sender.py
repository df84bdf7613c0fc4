"""The courier's outgoing side: snapshots and reports, in the order in which they happened."""

from __future__ import annotations

import logging
import queue
from typing import assert_never

from sidecast.errors import SidecastError
from sidecast.protos import nowcast_pb2 as pb
from sidecast.trainer.courier.client import NowcastClient
from sidecast.trainer.courier.link import Link
from sidecast.trainer.courier.uploader import Uploader
from sidecast.trainer.pipe.messages import Report, Snapshot

log = logging.getLogger(__name__)


class Sender:
    """Sends what the hook hands over; ``run`` is a thread's work.

    Args:
        client: To the service.
        rank: This rank.
        link: Says whether the service is there.
        uploader: For the snapshots.
    """

    def __init__(self, client: NowcastClient, rank: int, link: Link, uploader: Uploader) -> None:
        self._client = client
        self._rank = rank
        self._link = link
        self._uploader = uploader
        # With the session that they belong to: nothing of a run's earlier session may reach a later one.
        self._queue: queue.SimpleQueue[tuple[str, Snapshot | Report] | None] = queue.SimpleQueue()

    def put(self, session_id: str, message: Snapshot | Report) -> None:
        """Takes a snapshot or a report."""
        self._queue.put((session_id, message))

    def end(self) -> None:
        """Makes ``run`` return once everything before has been sent."""
        self._queue.put(None)

    def run(self) -> None:
        """Sends until told to end."""
        while (item := self._queue.get()) is not None:
            session_id, message = item
            match message:
                case Snapshot():
                    self._uploader.upload(session_id, message)
                case Report():
                    self._report(session_id, message)
                case _:
                    assert_never(message)

    def _report(self, session_id: str, report: Report) -> None:
        request = pb.ReportRequest(
            session_id=session_id,
            rank=self._rank,
            outcome=report.outcome.upper(),
            version=report.version,
            epoch=report.epoch,
        )
        try:
            if self._link.wait_connected(session_id, self._client.call_s, outlasts_outage=False):
                self._client.report(request)
        except SidecastError as error:
            # The epoch also travels with every chunk: a lost report costs a count, nothing else.
            log.warning("rank %d: the report of step %d was not taken: %s", self._rank, report.step, error)
