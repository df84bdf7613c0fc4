"""What earlier services have left of their runs, until those ask for it. On one event loop, so without locks."""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.errors import ForbiddenError, WrongStateError
from sidecast.nowcaster_service.keeping.examination import Found, examine
from sidecast.nowcaster_service.keeping.record import Identity, Record
from sidecast.nowcaster_service.keeping.run_folder import NOTE_NAME, folder_name, forget, key_of, owner_of
from sidecast.nowcaster_service.keeping.sealed import RecordError, Sealed, read_sealed
from sidecast.nowcaster_service.vector_store import RECORD_NAME, HistoryStore
from sidecast.protos import nowcast_pb2 as pb

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Waiting:
    folder: Path
    sealed: Sealed
    # What it says; sealed or not, that is not known without the secret.
    record: Record
    examination: asyncio.Task[Found | str] | None = None

    @property
    def is_being_read(self) -> bool:
        return self.examination is not None and not self.examination.done()

    @property
    def num_bytes(self) -> int:
        return len(list(self.record.files())) * self.record.identity.num_bytes


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What is left of a run, for its session.

    Attributes:
        identity: Whose it was; None if there is nothing.
        folder: Where it is; None if the history begins anew.
        found: The history.
        reason: Why the history begins anew; empty if it does not, or if the run has asked for nothing.
        is_paused: Whether the run was, whatever has become of its history.
    """

    identity: Identity | None = None
    folder: Path | None = None
    found: Found | None = None
    reason: str = ""
    is_paused: bool = False


class KeptRuns:
    """The recorded runs of earlier services.

    Args:
        store: Which has moved their folders into its own.
        clock: Monotonic seconds.
        lock_timeout_s: How long to wait for an engine that is still at work on a run's files.
    """

    def __init__(self, store: HistoryStore, clock: Callable[[], float], lock_timeout_s: float) -> None:
        self._store = store
        self._clock = clock
        self._began_s = clock()
        self._lock_timeout_s = lock_timeout_s
        # By the names of their folders, which are those of their runs.
        self._waiting: dict[str, _Waiting] = {}
        self._refused: dict[str, str] = {}
        for folder in store.left:
            self._find(folder)

    def _find(self, folder: Path) -> None:
        name = folder.name.partition("-")[0]
        try:
            sealed = read_sealed(folder / RECORD_NAME)
            record = Record.of(sealed.content)
            if folder_name(record.identity.run_id) != name:
                raise RecordError(f"the record is one of run {record.identity.run_id}, and lies in {folder.name}")
            if name in self._waiting or name in self._refused:
                raise RecordError(f"there is another record of run {record.identity.run_id}")
        except RecordError as error:
            log.warning("what is left in %s is of no use: %s", folder, error)
            self._refused[name] = str(error)
            self._remove(folder)
            if (other := self._waiting.pop(name, None)) is not None:
                self._remove(other.folder)
            return
        named = {*record.files(), RECORD_NAME, NOTE_NAME}
        for path in [path for path in folder.iterdir() if path.name not in named]:
            path.unlink(missing_ok=True)
        self._waiting[name] = _Waiting(folder=folder, sealed=sealed, record=record)

    # --- while they wait

    @property
    def idle_s(self) -> float:
        """For how long nobody has asked for those that wait."""
        return self._clock() - self._began_s

    def num_bytes(self, *, besides: str) -> int:
        """Of all vectors of runs that wait but one."""
        name = folder_name(besides)
        return sum(waiting.num_bytes for other, waiting in self._waiting.items() if other != name)

    def forget_all(self, *, besides: str = "") -> None:
        """Gives up what is left of all runs but one, and that of those that are being looked at."""
        kept = folder_name(besides)
        for name in [name for name, item in self._waiting.items() if name != kept and not item.is_being_read]:
            waiting = self._waiting.pop(name)
            if waiting.examination is not None:
                # Its session may be about to take it.
                self._refused[name] = "it has made room for others"
            log.info("what was left of run %s makes room", waiting.record.identity.run_id)
            self._remove(waiting.folder)

    def require_owner(self, request: pb.OpenRequest, caller: Caller) -> None:
        """Refuses to open a session of a run that waits for somebody else, or for a later session.

        Raises:
            ForbiddenError: The run was open with another secret.
            WrongStateError: A later session had superseded this one.
        """
        waiting = self._waiting.get(folder_name(request.run_id))
        if waiting is None:
            return
        identity = waiting.record.identity
        if not hmac.compare_digest(owner_of(caller, request.run_id), identity.owner):
            given = "another secret, or another tenant's token" if caller.secret else "no secret"
            raise ForbiddenError(f"run {request.run_id} is protected; the call carries {given}")
        if request.session_id in identity.superseded:
            raise WrongStateError(f"session {request.session_id} was superseded by a later one of its run")

    # --- when they are asked for

    async def examine(self, request: pb.OpenRequest, secret: str) -> None:
        """Reads what is left of a run, if its session goes on with it; others go on meanwhile.

        Whoever asks again while it is being read waits for the same end.
        """
        waiting = self._waiting.get(folder_name(request.run_id))
        if waiting is None or not _goes_on(waiting, request):
            return
        if waiting.examination is None:
            waiting.examination = asyncio.create_task(self._examine(waiting, key_of(secret, request.run_id)))
        await asyncio.shield(waiting.examination)

    async def _examine(self, waiting: _Waiting, key: bytes) -> Found | str:
        try:
            return await asyncio.to_thread(examine, waiting.folder, waiting.sealed, key, self._lock_timeout_s)
        except Exception as error:
            # Whatever it is, it must not be in the way of the run for ever.
            log.warning("what is left in %s is of no use: %s", waiting.folder, error)
            return str(error)

    def take(self, request: pb.OpenRequest) -> Taken:
        """Hands over what ``examine`` has found; what is of no use to the session is removed."""
        name = folder_name(request.run_id)
        waiting = self._waiting.pop(name, None)
        if waiting is None:
            return Taken(reason=self._refused.pop(name, ""))
        found: Found | str = ""
        if _goes_on(waiting, request) and waiting.examination is not None and waiting.examination.done():
            found = waiting.examination.result()
        identity, is_paused = waiting.record.identity, waiting.record.is_paused
        if isinstance(found, Found):
            return Taken(identity=identity, folder=waiting.folder, found=found, is_paused=is_paused)
        self._remove(waiting.folder)
        return Taken(identity=identity, reason=found, is_paused=is_paused)

    def _remove(self, folder: Path) -> None:
        forget(folder)
        self._store.remove_folder(folder)


def _goes_on(waiting: _Waiting, request: pb.OpenRequest) -> bool:
    return request.resumed or request.session_id == waiting.record.identity.session_id
