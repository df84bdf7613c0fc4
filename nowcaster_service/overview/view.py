"""What a caller may see of a service: the answer to ``Status``, and what the page shows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.config import ServiceConfig
from sidecast.nowcaster_service.dispatch import Dispatcher
from sidecast.nowcaster_service.overview.activity import RecentNowcast
from sidecast.nowcaster_service.read_outs.messages import probe_status, read_out_statuses
from sidecast.nowcaster_service.session import Session
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.session_table import SessionTable
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.protos import nowcast_pb2 as pb

# Between two looks at whoever else wants the event loop: a few ms.
SESSIONS_AT_ONCE = 5


class Faulty(Protocol):
    """Whoever knows whether nowcasts can be made."""

    def fault(self) -> str:
        """Why no nowcast can be made now; empty if they can be."""
        ...


class Overview:
    """Of one service process; lives on its event loop.

    Args:
        config: Settings.
        store: Where vectors live.
        sessions: All that are open.
        engines: Who runs predictors.
        dispatcher: Who waits for them.
        version: Of the service.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        config: ServiceConfig,
        store: HistoryStore,
        sessions: SessionTable,
        engines: Faulty,
        dispatcher: Dispatcher,
        *,
        version: str,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._store = store
        self._sessions = sessions
        self._engines = engines
        self._dispatcher = dispatcher
        self._version = version
        self._clock = clock
        self._started_s = clock()

    async def reply(self, caller: Caller, *, with_sessions: bool = True) -> pb.StatusReply:
        """What a caller may see.

        Args:
            caller: Who looks; sees its own runs alone, and an operator all.
            with_sessions: Whether the runs are wanted, too.
        """
        config, owners = self._config, self._sessions.owners
        reply = pb.StatusReply(
            service_version=self._version,
            uptime_seconds=self._clock() - self._started_s,
            history_bytes=self._store.used_bytes,
            history_budget_bytes=self._store.budget_bytes,
            run_budget_bytes=config.run_budget_bytes or self._store.budget_bytes,
            engines_fault=self._engines.fault(),
            engines=pb.EnginesStatus(
                num_engines=config.num_engines,
                threads=config.engine_threads,
                gpus=config.engine_gpus,
                device=config.device or "",
            ),
        )
        if not with_sessions:
            return reply
        visible = owners.visible_runs(caller)
        for work, turns in self._dispatcher.queues.items():
            shown = turns.current if turns.current in visible else ""
            reply.queues.add(work=work, is_busy=turns.is_taken, num_waiting=turns.num_waiting, run_id=shown)
        for number, (session, _) in enumerate(list(self._sessions.items()), 1):
            if number % SESSIONS_AT_ONCE == 0:
                await asyncio.sleep(0)
            session_id = session.settings.session_id
            # Others may have come to their end meanwhile.
            if self._sessions.is_open(session_id) and owners.is_visible(session_id, caller):
                reply.sessions.append(self._session(session, caller))
        return reply

    def _session(self, session: Session, caller: Caller) -> pb.SessionStatus:
        settings, counts, owners = session.settings, session.counts, self._sessions.owners
        activity = self._sessions.activity.of(settings.run_id)
        steps = session.history_steps
        newest = activity.snapshot_step if activity.snapshot_step is not None else max(steps, default=None)
        age_s = None if activity.snapshot_step is None else self._clock() - activity.committed_s
        return pb.SessionStatus(
            session_id=settings.session_id if owners.is_shown_to(settings.session_id, caller) else "",
            run_id=settings.run_id,
            tenant=owners.tenant_of(settings.session_id),
            policy=policy_of(settings),
            predictor=settings.predictor,
            world_size=settings.world_size,
            num_joined=session.num_joined,
            num_parameters=settings.manifest.num_elements,
            epoch=session.epoch,
            history_steps=steps,
            context_len=settings.context_len,
            snapshot_interval_steps=settings.snapshot_interval_steps,
            snapshot_step=newest,
            snapshot_age_seconds=age_s,
            promised_bytes=settings.needed_bytes,
            num_committed=counts.committed,
            num_aborted=counts.aborted,
            num_published=counts.published,
            num_failed=counts.failed,
            num_applied=counts.applied,
            num_accepted=counts.accepted,
            num_rolled_back=counts.rolled_back,
            num_rejected=counts.rejected,
            recent_nowcasts=[self._nowcast(item) for item in activity.recent],
            is_paused=session.is_paused,
            may_pause=owners.may_pause(settings.session_id, caller),
            idle_seconds=self._sessions.idle_s(settings.session_id),
            read_outs=read_out_statuses(session),
            probe=probe_status(session),
        )

    def _nowcast(self, item: RecentNowcast) -> pb.NowcastStatus:
        return pb.NowcastStatus(
            version=item.version,
            base_step=item.base_step,
            horizon_intervals=item.horizon_intervals,
            relative_norm=item.relative_norm,
            nowcast_seconds=item.nowcast_s,
            age_seconds=self._clock() - item.told_s,
            outcome=item.outcome,
            failure=item.failure,
        )


def policy_of(settings: SessionSettings) -> str:
    """What a run wants: "jump", "push", or "read_outs" alone."""
    if settings.push is None:
        return "jump"
    return "push" if settings.makes_pushes else "read_outs"
