"""The courier's link to the service: opens and joins the session, watches it, and does so again after every break."""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections.abc import Callable, Sequence

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.courier.client import EventStream, NowcastClient
from sidecast.trainer.courier.refusals import (
    CorruptError,
    OutdatedError,
    RefusedError,
    ReopenError,
    ResendError,
    UnavailableError,
)
from sidecast.trainer.pipe.messages import Connected, Disconnected, Refused, Session, ToHook

log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0
# After a refusal.
FIRST_REFUSED_BACKOFF_S, MAX_REFUSED_BACKOFF_S = 5.0, 60.0


class LinkState(enum.Enum):
    """What is known of the way to the service, for the session that is wanted."""

    CONNECTING = "connecting"
    """The first attempt since the session began or the connection broke is not over, or rank 0 has yet to open it."""
    CONNECTED = "connected"
    """The session is joined and watched, as far as is known: a break may not have been noticed yet."""
    AWAY = "away"
    """The last attempt failed or was refused."""


class Link:
    """Keeps one session open; ``run`` is a thread's work.

    Args:
        client: To the service.
        rank: This rank.
        shards: What it uploads and what it fetches.
        opening: Rank 0: builds the announcement of a session; None for the others.
        session: The first session.
        tell: Tells the hook.
        on_event: Called with the session's id and each of its events.
    """

    def __init__(
        self,
        client: NowcastClient,
        rank: int,
        shards: tuple[Sequence[ShardSpec], Sequence[ShardSpec]],
        opening: Callable[[Session], pb.OpenRequest] | None,
        session: Session,
        *,
        tell: Callable[[ToHook], None],
        on_event: Callable[[str, pb.SessionEvent], None],
    ) -> None:
        self._client = client
        self._rank = rank
        self._shards = shards
        self._opening = opening
        self._tell = tell
        self._on_event = on_event
        # What follows changes together, under the condition: a resume replaces the session and ends its watch.
        self._changed = threading.Condition()
        self._session = session
        self._events: EventStream | None = None
        self._state = LinkState.CONNECTING
        self._is_ending = False

    @property
    def session(self) -> Session:
        """The session to keep open."""
        return self._session

    @property
    def is_connected(self) -> bool:
        """Whether the session has been joined and is being watched."""
        return self._state is LinkState.CONNECTED

    def begin(self, session: Session) -> None:
        """Turns to another session."""
        with self._changed:
            self._session = session
            self._state = LinkState.CONNECTING
            if self._events is not None:
                # The watch may not hear anything for hours; it would keep this thread from the new session.
                self._events.cancel()
            self._changed.notify_all()

    def end(self) -> None:
        """Makes ``run`` return."""
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()

    def wait_connected(self, session_id: str, timeout_s: float, *, outlasts_outage: bool) -> bool:
        """Waits until a session is joined; False if it is over, or the time is up.

        Args:
            session_id: The session.
            timeout_s: How long to wait at most.
            outlasts_outage: Wait, too, while the service is known to be away.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while self._session.session_id == session_id and not self._is_ending:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0:
                    # Also while joined: a service whose disk is full would be asked for ever.
                    return False
                if self._state is LinkState.CONNECTED:
                    return True
                if self._state is LinkState.AWAY and not outlasts_outage:
                    return False
                self._changed.wait(left_s)
        return False

    def rest(self, session_id: str, seconds: float) -> bool:
        """Waits for so long, unless a session is over before; says whether it goes on."""

        def is_over() -> bool:
            return self._is_ending or self._session.session_id != session_id

        with self._changed:
            return not self._changed.wait_for(is_over, seconds)

    def run(self) -> None:
        """Opens, joins and watches, until the courier ends."""
        backoff_s, refused_s = FIRST_BACKOFF_S, FIRST_REFUSED_BACKOFF_S
        reported = ""
        fault: Refused | Disconnected | None
        unopened: tuple[Session, float] | None = None
        while not self._is_ending:
            session = self._session
            wait_s = backoff_s
            state, fault = LinkState.AWAY, None
            try:
                if self._connect(session):
                    # Should this break, the attempt that follows will show what it means.
                    state = LinkState.CONNECTING
                    backoff_s = wait_s = FIRST_BACKOFF_S
                    reported, unopened, refused_s = "", None, FIRST_REFUSED_BACKOFF_S
                    self._watch(session.session_id)
            except RefusedError as error:
                # Final for a run that begins, whose hook then ends its courier. Later it may be the service that is
                # wrong: one with another token, or another server at its port. It is asked again, slowly.
                wait_s = refused_s
                refused_s = min(2 * refused_s, MAX_REFUSED_BACKOFF_S)
                fault, unopened = Refused(reason=str(error)), None
            except ReopenError as error:
                # Rank 0 has not opened the session yet, or the service was restarted: soon it will be there.
                log.debug("rank %d: %s", self._rank, error)
                if unopened is None or unopened[0] is not session:
                    unopened = session, time.monotonic()
                # Unless rank 0 is gone, or refused: a sync run would wait for every single snapshot.
                is_awaited = time.monotonic() - unopened[1] <= self._client.open_s
                if is_awaited:
                    state = LinkState.CONNECTING
                else:
                    fault = Disconnected(reason=str(error))
            except (UnavailableError, CorruptError, OutdatedError, ResendError) as error:
                # A break is told at once, although the next attempt may succeed: a service that was restarted has
                # forgotten what a sync run waits for.
                fault, unopened = Disconnected(reason=str(error)), None
            with self._changed:
                is_wanted = self._session is session
                if is_wanted:
                    self._state = state
                    self._changed.notify_all()
            if fault is not None and reported != fault.reason and is_wanted:
                reported = fault.reason
                # After the state: a snapshot that is staged by who has heard of a break is not to be begun as if there
                # had been none, and then to be held for as long as a transfer may last.
                self._tell(fault)
            with self._changed:
                # Until another session is wanted, or it is time to try again.
                self._changed.wait_for(lambda: self._is_ending or self._session is not session, wait_s)  # noqa: B023
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _connect(self, session: Session) -> bool:
        self._client.act_for(session.run_secret)
        self._client.wait_reachable()
        if self._opening is not None:
            self._client.open(self._opening(session))
        is_paused = self._client.join(session.session_id, self._rank, *self._shards)
        with self._changed:
            if self._session is not session:
                return False
            self._events = self._client.watch(session.session_id, self._rank)
            self._state = LinkState.CONNECTED
            self._changed.notify_all()
        self._tell(Connected(session_id=session.session_id, is_paused=is_paused))
        return True

    def _watch(self, session_id: str) -> None:
        assert self._events is not None, "connected before"
        for event in self._events:
            if self._session.session_id != session_id:
                return
            self._on_event(session_id, event)
