"""The files of one run, and the record beside them that makes them worth something after the service has died."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sidecast.nowcaster_service.access.callers import Caller
from sidecast.nowcaster_service.access.owner import announcement_digest
from sidecast.nowcaster_service.keeping.record import Identity, Record
from sidecast.nowcaster_service.keeping.sealed import write_sealed
from sidecast.nowcaster_service.session_settings import SessionSettings
from sidecast.nowcaster_service.vector_store import RECORD_NAME, HistoryStore, VectorFile
from sidecast.protos import nowcast_pb2 as pb

log = logging.getLogger(__name__)

NOTE_NAME = "note"
NAME_BYTES = 8
# Ended sessions of a run that may still be tried.
MAX_SUPERSEDED = 16


def folder_name(run_id: str) -> str:
    """What the folder of a run is called: nothing that a client says goes into a path."""
    return hashlib.blake2b(run_id.encode(), digest_size=NAME_BYTES).hexdigest()


def key_of(secret: str, run_id: str) -> bytes:
    """What a run's records are sealed with: only who knows its secret can make them, or have them used."""
    return hmac.new(secret.encode(), f"sidecast history of {run_id}".encode(), hashlib.sha256).digest()


def owner_of(caller: Caller, run_id: str) -> str:
    """What tells that a call is a run's tenant's and shows its secret, in hexadecimal digits; it seals nothing."""
    tenant = f" {caller.tenant}" if caller.tenant else ""
    return hmac.new(key_of(caller.secret, run_id), f"owner{tenant}".encode(), hashlib.sha256).hexdigest()


class RunFolder:
    """Where the vectors of one run lie, whichever of its sessions they belong to.

    Args:
        store: Of the service.
        path: A folder of the store's.
    """

    def __init__(self, store: HistoryStore, path: Path) -> None:
        self.path = path
        self._store = store

    def create(self, num_elements: int) -> VectorFile:
        """See ``HistoryStore.create``."""
        return self._store.create(num_elements, self.path)

    async def prepare(self, num_elements: int) -> bool:
        """See ``HistoryStore.prepare``."""
        return await self._store.prepare(num_elements, self.path)

    def remove(self) -> None:
        """Gives everything up; no vector of the run is in use any more."""
        forget(self.path)
        self._store.drop_spares()
        self._store.remove_folder(self.path)


def forget(folder: Path) -> None:
    """Removes the record of a folder: its files are worth nothing to a later service from now on."""
    try:
        (folder / RECORD_NAME).unlink(missing_ok=True)
    except OSError as error:
        # A later service finds out by the files' digests.
        log.warning("the record in %s cannot be removed: %s", folder, error)


@dataclass(frozen=True)
class Note:
    """Where an engine notes that an average is whole, and what makes it known as that engine's.

    Attributes:
        path: Of the note.
        key: That it is sealed with.
    """

    path: Path
    key: bytes


class Recorder:
    """Writes the record of a run while one of its sessions is open.

    Args:
        folder: Of the run.
        identity: Of the session.
        key: Of the run.
    """

    def __init__(self, folder: Path, identity: Identity, key: bytes) -> None:
        self.identity = identity
        self._folder = folder
        self._key = key
        self._is_failing = False

    def write(self, record: Record | None) -> None:
        """Records what is to be used after this service has died; None: nothing.

        It cannot fail: without room for it, nothing is recorded, which the log says once.
        """
        if record is None:
            forget(self._folder)
            return
        try:
            write_sealed(self._folder / RECORD_NAME, record.content(), self._key)
            self._is_failing = False
        except (OSError, ValueError) as error:
            # What an earlier record says may be overwritten from now on.
            forget(self._folder)
            if not self._is_failing:
                self._is_failing = True
                log.warning("the history of run %s would not survive a restart: %s", self.identity.run_id, error)

    def note(self, nonce: str) -> Note:
        """For the engine that makes one push.

        Args:
            nonce: Names this very attempt.
        """
        return note_of(self._folder, self._key, nonce)


def note_of(folder: Path, key: bytes, nonce: str) -> Note:
    """Where the note of one attempt to make a push is, and its key.

    Args:
        folder: Of the run.
        key: Of the run.
        nonce: Names the attempt.
    """
    return Note(folder / NOTE_NAME, hmac.new(key, f"note {nonce}".encode(), hashlib.sha256).digest())


def recorder_of(
    folder: RunFolder, settings: SessionSettings, request: pb.OpenRequest, caller: Caller, superseded: Sequence[str]
) -> Recorder:
    """Writes the record of a session.

    Args:
        folder: Of its run.
        settings: Of the session.
        request: What it is opened with.
        caller: Whose run it is, with its secret.
        superseded: Ids of earlier sessions of the run, oldest first.
    """
    run_id = settings.run_id
    identity = Identity(
        run_id=run_id,
        session_id=settings.session_id,
        owner=owner_of(caller, run_id),
        opened=announcement_digest(request),
        likeness=settings.likeness,
        schema_hash=settings.manifest.schema_hash,
        num_bytes=settings.num_vector_bytes,
        has_pushes=settings.push is not None,
        superseded=tuple(superseded[-MAX_SUPERSEDED:]),
    )
    return Recorder(folder.path, identity, key_of(caller.secret, run_id))
