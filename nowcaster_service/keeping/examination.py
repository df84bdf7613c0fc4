"""What a dead service has left of a run, read once and believed only if it is what the record says."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from sidecast.nowcaster_service.keeping.checksums import first_altered_byte
from sidecast.nowcaster_service.keeping.record import PendingRecord, PushRecord, Record, StateRecord
from sidecast.nowcaster_service.keeping.run_folder import note_of
from sidecast.nowcaster_service.keeping.sealed import RecordError, Sealed, read_sealed
from sidecast.protos.codec import vector_digest

# A nowcast that was being made when two services died may be what they died of.
MAX_TRIES = 2
NUM_READERS = 4
LOCK_RETRY_S = 0.05


@dataclass(frozen=True, kw_only=True)
class AveragedPush:
    """What has become of a push that was being made.

    Attributes:
        carry_file: Of the average that is whole; None if there is none.
        carry_digest: Of it.
        factor: What it is to be multiplied with, if that is all that is left to do.
        is_untouched: Whether nothing has been done yet: the push can be made from the beginning.
    """

    carry_file: str | None
    carry_digest: int = 0
    factor: float | None = None
    is_untouched: bool = False


@dataclass(kw_only=True)
class Found:
    """A history that is what it was.

    Attributes:
        record: What it consists of.
        maps: All of its files, by name.
        push: What has become of the push that was being made; None if none was.
        lost: What a nowcast, or an interval, is lost for; empty if nothing is.
    """

    record: Record
    maps: dict[str, mmap.mmap] = field(default_factory=dict)
    push: AveragedPush | None = None
    lost: str = ""


def examine(folder: Path, sealed: Sealed, key: bytes, lock_timeout_s: float) -> Found:
    """Reads all files of a run once; takes a third of a second for each GB and core.

    Args:
        folder: Of the run.
        sealed: Its record.
        key: Of the run.
        lock_timeout_s: How long to wait for an engine that is still at work on them.

    Raises:
        RecordError: The record is somebody else's, or a file is not what it says.
    """
    sealed.require_key(key)
    found = Found(record=Record.of(sealed.content))
    record, pending = found.record, found.record.pending
    with contextlib.ExitStack() as locks:
        push = None if pending is None else pending.push
        if push is not None:
            for name in (push.before.file, push.file):
                locks.enter_context(_engine_is_done(folder / name, lock_timeout_s))
        found.maps = {name: _mapped(folder / name, record.identity.num_bytes) for name in record.files()}
        _check_all([_check_of_state(state, found) for state in record.states])
        if record.prediction is not None:
            _check_digest(found, record.prediction.file, record.prediction.digest)
        if record.carry is not None:
            _check_digest(found, record.carry.file, record.carry.digest)
        kept = {average.file: average.digest for average in record.averages}
        kept |= {item.average.file: item.average.digest for item in record.best}
        for file, digest in kept.items():
            _check_digest(found, file, digest)
        if push is not None:
            found.push = _averaged(folder, key, push, found)
    found.lost = "" if pending is None else _lost(pending, found.push)
    return found


def _lost(pending: PendingRecord, push: AveragedPush | None) -> str:
    if pending.num_tries >= MAX_TRIES:
        return f"{pending.num_tries} services have ended while the nowcast of step {pending.step} was being made"
    if push is not None and not push.is_untouched and push.factor is None:
        return f"the interval up to step {pending.step} is left out: the service has ended while it was being averaged"
    return ""


def _averaged(folder: Path, key: bytes, push: PushRecord, found: Found) -> AveragedPush:
    before = memoryview(found.maps[push.before.file])
    if push.factor is not None:
        _check_digest(found, push.before.file, push.digest)
        return AveragedPush(carry_file=push.before.file, carry_digest=push.digest, factor=push.factor)
    with contextlib.suppress(RecordError, KeyError):
        note = note_of(folder, key, push.nonce)
        sealed = read_sealed(note.path)
        sealed.require_key(note.key)
        factor, digest = sealed.content["factor"], sealed.content["carry_digest"]
        if vector_digest(before) == digest:
            return AveragedPush(carry_file=push.before.file, carry_digest=digest, factor=factor)
    is_whole = not push.begins and vector_digest(memoryview(found.maps[push.file])) == push.digest
    if not (push.begins or is_whole):
        raise RecordError(f"neither {push.before.file} nor {push.file} holds a whole average")
    is_untouched = first_altered_byte(before, push.before.checksums) is None
    carry_file = push.file if is_whole else None
    return AveragedPush(carry_file=carry_file, carry_digest=push.digest, is_untouched=is_untouched)


def _check_of_state(state: StateRecord, found: Found) -> Callable[[], None]:
    def check() -> None:
        altered = first_altered_byte(memoryview(found.maps[state.file]), state.checksums)
        if altered is not None:
            raise RecordError(f"{state.file} is not the state of step {state.step} any more, from byte {altered} on")

    return check


def _check_digest(found: Found, file: str, digest: int) -> None:
    if vector_digest(memoryview(found.maps[file])) != digest:
        raise RecordError(f"{file} is not what it was when it was made")


def _check_all(checks: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(min(NUM_READERS, os.cpu_count() or 1), thread_name_prefix="examination") as readers:
        for _ in readers.map(lambda check: check(), checks):
            pass


def _mapped(path: Path, num_bytes: int) -> mmap.mmap:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise RecordError(f"{path.name} cannot be opened: {error.strerror}") from error
    try:
        found_bytes = os.fstat(descriptor).st_size
        if found_bytes != num_bytes:
            raise RecordError(f"{path.name} has {found_bytes} bytes, not {num_bytes}")
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _engine_is_done(path: Path, timeout_s: float) -> Iterator[None]:
    """Keeps a file from any engine that would write to it; see ``written_alone``."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError as error:
        raise RecordError(f"{path.name} cannot be opened: {error.strerror}") from error
    try:
        deadline_s = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise RecordError(f"an engine still writes to {path.name} after {timeout_s:g} s") from None
            threading.Event().wait(LOCK_RETRY_S)
        yield
    finally:
        os.close(descriptor)
