"""All sessions of one service: who is open, who watches, who must give way. On one event loop, so without locks."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace

from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.access.fetches import Fetches
from sidecast.nowcaster_service.access.owner import announcement_digest
from sidecast.nowcaster_service.access.owners import Owners
from sidecast.nowcaster_service.access.watchers import Watchers
from sidecast.nowcaster_service.errors import MalformedError, SaturatedError, UnknownSessionError, WrongStateError
from sidecast.nowcaster_service.keeping.examination import Found
from sidecast.nowcaster_service.keeping.kept_runs import KeptRuns, Taken
from sidecast.nowcaster_service.keeping.restoration import Restoration
from sidecast.nowcaster_service.keeping.run_folder import RunFolder, folder_name, recorder_of
from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.nowcaster_service.overview.activity import Activity
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_events import (
    Event,
    FailureEvent,
    FoldEvent,
    NowcastTask,
    Prediction,
    ProbeEvent,
    event_message,
    pause_message,
)
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.protos import nowcast_pb2 as pb

log = logging.getLogger(__name__)

# Ended sessions of resumed runs whose couriers may still come back for them.
MAX_SUPERSEDED = 1024
# A session that no courier has watched for so long is a dead job's, and gives way to one that needs its space.
ORPHAN_GRACE_S = 30.0


class SessionTable:
    """Sessions by id, within the history budget.

    Args:
        store: Where vectors live.
        metrics: What Prometheus sees.
        clock: Monotonic seconds.
        session_timeout_s: A session that nobody has used or watched for so long is ended.
        max_sessions: How many may be open at once.
        run_budget_bytes: Most history that one of them may need.
        may_pause_by_token: See ``Owners``.
        lock_timeout_s: How long to wait for an engine of a dead service that is still at work on a run's files.

    Attributes:
        owners: Whose they are.
        fetches: Under way, of predictions.
        exports: Under way, of read-outs.
        kept: What earlier services have left.
        activity: What has happened of late, by run.
    """

    def __init__(
        self,
        store: HistoryStore,
        metrics: ServiceMetrics,
        clock: Callable[[], float],
        session_timeout_s: float,
        *,
        max_sessions: int,
        run_budget_bytes: int,
        lock_timeout_s: float = 0.0,
        may_pause_by_token: bool = False,
    ) -> None:
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._session_timeout_s = session_timeout_s
        self._max_sessions = max_sessions
        self._run_budget_bytes = run_budget_bytes
        self._sessions: dict[str, Session] = {}
        self._last_seen_s: dict[str, float] = {}
        self.owners = Owners(by_token=may_pause_by_token)
        self.fetches, self.exports = Fetches(), Fetches()
        self.activity = Activity(clock)
        self._watchers = Watchers()
        self._superseded: deque[str] = deque(maxlen=MAX_SUPERSEDED)
        self.kept = KeptRuns(store, clock, lock_timeout_s)
        self._folders: dict[str, RunFolder] = {}

    def find(self, session_id: str) -> Session | None:
        """A session if it is open; an open one has been used just now.

        Raises:
            WrongStateError: It was superseded by a later one of its run.
        """
        if session_id in self._superseded:
            raise WrongStateError(f"session {session_id} was superseded by a later one of its run")
        session = self._sessions.get(session_id)
        if session is not None:
            self._last_seen_s[session_id] = self._clock()
        return session

    def get(self, session_id: str) -> Session:
        """An open session, used just now.

        Raises:
            UnknownSessionError: There is no such session.
        """
        session = self._sessions.get(session_id)
        if session is None:
            raise UnknownSessionError(f"session {session_id!r} is not known here; open it first")
        self._last_seen_s[session_id] = self._clock()
        return session

    def get_for(self, session_id: str, caller: Caller) -> Session:
        """An open session, for a call that shows its run's secret.

        Raises:
            ForbiddenError: The call shows another one, or none, or is another tenant's.
            UnknownSessionError: There is no such session.
        """
        self.owners.require(session_id, caller)
        return self.get(session_id)

    def of_run(self, run_id: str, caller: Caller) -> Session:
        """The open session of a run; see ``get_for``. The call does not count as one of the session's own."""
        session_id = self.owners.session_of(run_id, caller)
        if session_id is None:
            raise UnknownSessionError(f"run {run_id[:100]!r} has no open session here")
        return self._sessions[session_id]

    def require_owner(self, request: pb.OpenRequest, caller: Caller) -> None:
        """Refuses to open a session of a run that is somebody else's.

        Raises:
            ForbiddenError: The run, or the session, is open with another secret.
            MalformedError: The session is open as something else.
        """
        self.owners.require_for(request, caller)
        self.kept.require_owner(request, caller)

    def items(self) -> Iterator[tuple[Session, float]]:
        """Every session with the seconds since it was used."""
        for session_id, session in self._sessions.items():
            yield session, self.idle_s(session_id)

    def is_open(self, session_id: str) -> bool:
        """Whether there is such a session; that somebody asks does not count as its use."""
        return session_id in self._sessions

    def num_watchers(self, session_id: str) -> int:
        return self._watchers.num_of(session_id)

    # --- from its beginning to its end

    def begin(
        self, settings: SessionSettings, request: pb.OpenRequest, caller: Caller
    ) -> tuple[Session, NowcastTask] | None:
        """Opens a session; an earlier one of its run ends, and hands over what a resume may keep.

        What ``kept.examine`` has found of the run, the session goes on with.

        Returns:
            A nowcast that was being made when an earlier service ended, and the session that made it.

        Raises:
            MalformedError: Its history is larger than the whole budget.
            SaturatedError: Its history does not fit beside the others'.
            ForbiddenError: The run is somebody else's.
        """
        self.expire()
        self.require_owner(request, caller)
        self._make_room(settings)
        earlier = [session for session in self._sessions.values() if session.settings.run_id == settings.run_id]
        session_id, run_id = settings.session_id, settings.run_id
        taken = self.kept.take(request)
        if run_id not in self._folders:
            self._folders[run_id] = RunFolder(self._store, taken.folder or self._store.new_folder(folder_name(run_id)))
        folder = self._folders[run_id]
        ended = self._supersede(taken, earlier, session_id)
        recorder = recorder_of(folder, settings, request, caller, ended) if caller.secret else None
        session = Session(settings, folder, lambda event: self._on_event(session_id, event), recorder)
        session.is_paused = taken.is_paused
        pending = None
        if taken.found is not None:
            pending = self._restore(session, folder, taken.found, request)
        elif taken.reason:
            self._tell_loss(settings, f"the history begins anew: {taken.reason}", 0)
        for superseded in earlier:
            session.is_paused |= superseded.is_paused
            if request.resumed:
                session.adopt(superseded, request.resume_step, request.resume_epoch)
        # Before anything that an earlier record names is given back.
        session.record()
        for superseded in earlier:
            self._end(superseded.settings.session_id)
        self._sessions[session_id] = session
        self.owners.begin(request, caller)
        self._last_seen_s[session_id] = self._clock()
        self._metrics.sessions.set(len(self._sessions))
        self._metrics.history_bytes.set(self._store.used_bytes)
        self._metrics.begin_run(settings.run_id, is_paused=session.is_paused)
        log.info(
            "session %s of run %s: %d ranks, %d parameters, predictor %s, horizons %s",
            session_id,
            settings.run_id,
            settings.world_size,
            settings.manifest.num_elements,
            settings.predictor,
            settings.horizons[:12],
        )
        return pending

    def _restore(
        self, session: Session, folder: RunFolder, found: Found, request: pb.OpenRequest
    ) -> tuple[Session, NowcastTask] | None:
        """Lets a session go on with a history; with its own, or with what a resume keeps of an earlier session's."""
        settings, identity = session.settings, found.record.identity
        restoration = Restoration(found, folder.path, self._store, settings)
        is_same = identity.session_id == settings.session_id
        is_model = identity.schema_hash == settings.manifest.schema_hash
        has_pushes = settings.push is not None
        is_alike = is_model and identity.likeness == settings.likeness
        if (
            not is_model
            or identity.has_pushes != has_pushes
            or (has_pushes and not is_alike)
            or (is_same and identity.opened != announcement_digest(request))
        ):
            if is_model and not is_same:
                # They depend on the model alone.
                # What is kept for its loss is pinned before averages are given back: it may be one of them.
                averages, best = restoration.averages(), restoration.best()
                session.read_outs.adopt_or_drop(averages, request.resume_step)
                session.read_outs.probe.restore(restoration.probe_points(), best, request.resume_step)
            restoration.discard()
            if is_same:
                self._tell_loss(settings, "the history begins anew: the session was opened as something else", 0)
            return None
        holder = session
        if not is_same:
            before = replace(settings, session_id=identity.session_id)
            holder = Session(before, folder, lambda event: None)
        task = holder.restore(restoration.state(is_alike=is_alike))
        if found.lost and found.record.pending is not None:
            self._tell_loss(settings, found.lost, found.record.pending.step)
        elif is_alike and task is None and found.record.pending is not None:
            reason = "the service has ended while it was being made, and states that it needs are gone"
            self._tell_loss(settings, reason, found.record.pending.step)
        if not is_same:
            session.adopt(holder, request.resume_step, request.resume_epoch)
            session.record()
            holder.close()
        log.info(
            "run %s goes on after a restart, with the snapshots of steps %s", settings.run_id, session.history_steps
        )
        return None if task is None else (holder, task)

    def _supersede(self, taken: Taken, earlier: Sequence[Session], session_id: str) -> list[str]:
        """Refuses all earlier sessions of a run from now on; returns their ids, oldest first."""
        identities = [session.recorder.identity for session in earlier if session.recorder is not None]
        if taken.identity is not None:
            identities.insert(0, taken.identity)
        ended = [name for identity in identities for name in (*identity.superseded, identity.session_id)]
        ended += [session.settings.session_id for session in earlier]
        ended = [name for name in dict.fromkeys(ended) if name != session_id]
        self._superseded.extend(name for name in ended if name not in self._superseded)
        return ended

    def _tell_loss(self, settings: SessionSettings, reason: str, step: int) -> None:
        log.warning("run %s: %s", settings.run_id, reason)
        self._watchers.tell_each_first(settings.session_id, event_message(FailureEvent(step, reason)))

    def _make_room(self, settings: SessionSettings) -> None:
        """Ends sessions that nobody watches any more, the longest idle first, until this one fits."""
        needs = (
            f"a session of {settings.manifest.num_elements} parameters needs {settings.needed_bytes} bytes of history "
            f"({settings.context_len} states and working copies, 4 bytes each)"
        )
        budget_bytes = self._store.budget_bytes
        if settings.needed_bytes > budget_bytes:
            raise MalformedError(f"{needs}; the service has {budget_bytes} (sidecast serve --history-gib)")
        if settings.needed_bytes > self._run_budget_bytes:
            raise MalformedError(
                f"{needs}; one run may have {self._run_budget_bytes} (sidecast serve --history-gib-per-run)"
            )
        others = {
            session_id: session.settings
            for session_id, session in self._sessions.items()
            if session.settings.run_id != settings.run_id
        }
        promised, num_others = sum(other.needed_bytes for other in others.values()), len(others)
        waiting_bytes = self.kept.num_bytes(besides=settings.run_id)
        if promised + waiting_bytes + settings.needed_bytes > budget_bytes and self.kept.idle_s > ORPHAN_GRACE_S:
            self.kept.forget_all(besides=settings.run_id)
            waiting_bytes = self.kept.num_bytes(besides=settings.run_id)
        promised += waiting_bytes
        for session_id in sorted(others, key=self._last_seen_s.__getitem__):
            is_orphan = not self.num_watchers(session_id) and self.idle_s(session_id) > ORPHAN_GRACE_S
            lacks_room = promised + settings.needed_bytes > budget_bytes or num_others >= self._max_sessions
            if lacks_room and is_orphan:
                log.info("session %s, which nobody watches, makes room for %s", session_id, settings.session_id)
                promised -= others[session_id].needed_bytes
                num_others -= 1
                self._expire(session_id)
        if promised + settings.needed_bytes > budget_bytes:
            raise SaturatedError(
                f"{needs}; {promised} of {budget_bytes} bytes are promised to others (sidecast serve --history-gib)"
            )
        if num_others >= self._max_sessions:
            raise SaturatedError(
                f"{num_others} sessions are open, as many as are allowed (sidecast serve --max-sessions)"
            )

    def idle_s(self, session_id: str) -> float:
        """Seconds since a session was used."""
        return self._clock() - self._last_seen_s[session_id]

    def expire(self) -> None:
        """Ends the sessions that nobody has used or watched for the session timeout, and what is left of others."""
        if self.kept.idle_s > self._session_timeout_s:
            self.kept.forget_all()
        for session_id in list(self._sessions):
            is_idle = self.idle_s(session_id) > self._session_timeout_s
            if is_idle and not self.num_watchers(session_id):
                log.info("session %s expired", session_id)
                self._expire(session_id)

    def _expire(self, session_id: str) -> None:
        run_id = self._sessions[session_id].settings.run_id
        self._end(session_id)
        # A run has one session at a time: a resume ends the one before.
        self._folders.pop(run_id).remove()
        self._metrics.forget_run(run_id)
        self.activity.forget(run_id)

    def _end(self, session_id: str) -> None:
        self._sessions.pop(session_id).close()
        self.fetches.end(session_id)
        self.exports.end(session_id)
        # The next model may have another size; an idle service holds nothing.
        self._store.drop_spares()
        self._last_seen_s.pop(session_id, None)
        self.owners.end(session_id)
        self._watchers.end(session_id)
        self._metrics.sessions.set(len(self._sessions))
        self._metrics.history_bytes.set(self._store.used_bytes)

    # --- events

    def watch(self, session_id: str, rank: int) -> AsyncGenerator[pb.SessionEvent, None]:
        """Yields what happens in an open session; see ``Watchers.watch``."""
        return self._watchers.watch(self.get(session_id), rank)

    def pause(self, run_id: str, is_paused: bool, caller: Caller) -> bool:
        """Asks a run to apply nothing, or to go on; says whether that is news. See ``Owners.to_pause``."""
        session_id = self.owners.to_pause(run_id, caller)
        if session_id is None:
            raise UnknownSessionError(f"run {run_id[:100]!r} has no open session here")
        if has_changed := self._sessions[session_id].pause(is_paused):
            log.info("run %s is %s", run_id, "paused: it applies nothing" if is_paused else "resumed")
            self._metrics.paused.labels(run_id).set(is_paused)
            self._watchers.tell(session_id, pause_message(is_paused))
        return has_changed

    def _on_event(self, session_id: str, event: Event) -> None:
        session = self._sessions.get(session_id)
        if session is None:
            return
        run = session.settings.run_id
        self.activity.note(run, event)
        self._metrics.note(run, session.settings.predictor, event)
        if isinstance(event, FoldEvent | ProbeEvent):
            return
        if isinstance(event, Prediction):
            self.fetches.replace(session_id, event.task.version)
        self._metrics.history_bytes.set(self._store.used_bytes)
        self._watchers.tell(session_id, event_message(event))
