"""A service's history as it is after kill -9, in this process: nothing was given back, nothing was closed in order."""

from __future__ import annotations

import os
from pathlib import Path

from sidecast.nowcaster_service.keeping.examination import Found, examine
from sidecast.nowcaster_service.keeping.run_folder import key_of
from sidecast.nowcaster_service.keeping.sealed import read_sealed
from sidecast.nowcaster_service.vector_store import RECORD_NAME, HistoryStore

SECRET = "0123456789abcdef" * 2


def abandon(store: HistoryStore) -> None:
    """The system lets go of a dead process's lock, and of nothing else."""
    os.close(store._lock._descriptor)


def reopened(store: HistoryStore) -> HistoryStore:
    """The store of the next service, after this one's has died."""
    abandon(store)
    return HistoryStore(store.folder.parent, store.budget_bytes)


def examined(folder: Path, run_id: str, secret: str = SECRET) -> Found:
    """What is found in what is left of a run."""
    return examine(folder, read_sealed(folder / RECORD_NAME), key_of(secret, run_id), 0.0)
