"""The apply log: what was done to the weights and when, enough to replay a run without a service.

One folder per run. ``applied-rank0.jsonl`` holds one JSON object per line: ``action`` (``applied`` or
``rolled_back``; ``lost`` for what could not be written), ``step``, and for jumps ``version``, ``digest``, ``weight``,
``merge``, ``moments``, ``base_step``, ``horizon_intervals``, ``file`` and ``crc32``; the file holds the rank's delta as
raw little-endian fp32.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from sidecast.atomic_files import replacing
from sidecast.errors import ConfigError
from sidecast.trainer.pipe.messages import Session


def log_path(folder: Path, rank: int) -> Path:
    """Where a rank's log is."""
    return folder / f"applied-rank{rank}.jsonl"


class Recorder:
    """Writes one rank's log and deltas; runs in the courier, off the training process.

    Args:
        folder: Made if it is not there; an earlier log of this rank is continued.
        rank: The rank.
    """

    def __init__(self, folder: str | Path, rank: int) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        self._path = log_path(self._folder, rank)
        # A run without jumps is replayed, too.
        self._path.touch()
        # What could not be written, by step, so that a later line can say so.
        self._lost: list[dict[str, Any]] = []

    def record(self, entry: Mapping[str, Any], delta: memoryview | None, session: Session) -> None:
        """Appends an entry, after writing the delta that it applied, if it did; the same entry again is harmless.

        Args:
            entry: To be written.
            delta: This rank's delta; None for entries without.
            session: The session that it belongs to. Its first entry takes out those of earlier sessions after the
                step where it begins: they are of a future that a resume has given up.

        Raises:
            OSError: The disk is full or failing. As soon as a line can be written again, the log says what it lacks.
        """
        line = {**entry, "session": session.session_id}
        kept = self._kept(session)
        if any((item["action"], item["step"]) == (line["action"], line["step"]) for item in kept):
            return
        try:
            if delta is not None:
                name = f"delta-step{entry['step']:08d}-rank{self._rank}.f32"
                with replacing(self._folder / name) as partial:
                    partial.write_bytes(delta)
                line |= {"file": name, "crc32": crc32(delta)}
            self._write([*kept, line])
        except OSError:
            self._lost.append({"action": "lost", "step": line["step"], "session": line["session"]})
            # A line may find room where a delta did not.
            with contextlib.suppress(OSError):
                self._write(self._kept(session))
            raise

    def resume(self, session: Session) -> None:
        """Takes out the entries that a resumed session gives up, also if it never makes one of its own."""
        self._write(self._kept(session))

    def _kept(self, session: Session) -> list[dict[str, Any]]:
        text = self._path.read_text() if self._path.exists() else ""
        # Without its newline the last line is what a killed courier left.
        known = [json.loads(item) for item in text.splitlines(keepends=True) if item.endswith("\n")]
        return [
            item
            for item in (*known, *self._lost)
            if item.get("session") == session.session_id or item["step"] <= session.resume_step
        ]

    def _write(self, entries: Sequence[Mapping[str, Any]]) -> None:
        with replacing(self._path) as partial:
            partial.write_bytes("".join(json.dumps(item) + "\n" for item in entries).encode())
        self._lost.clear()


def read_log(folder: Path, rank: int) -> list[dict[str, Any]]:
    """A rank's entries, oldest first.

    Raises:
        ConfigError: There is no log of this rank, or it is damaged or not whole.
    """
    path = log_path(folder, rank)
    if not path.is_file():
        raise ConfigError(f"nowcaster.replay_dir {folder} has no {path.name}; it was recorded with fewer ranks")
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ConfigError(f"nowcaster.replay_dir {folder}: {path.name} is damaged: {error}") from error
    for entry in entries:
        if entry["action"] == "lost":
            raise ConfigError(
                f"nowcaster.replay_dir {folder}: {path.name} lacks what was done at step {entry['step']}, which could "
                "not be written; such a run cannot be replayed"
            )
    return entries


def read_delta(folder: Path, entry: Mapping[str, Any], num_bytes: int) -> bytearray:
    """The delta that an entry applied.

    Raises:
        ConfigError: It is not the one that was recorded, or was recorded with other partitions.
    """
    path = folder / entry["file"]
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}, named by the apply log, cannot be read: {error.strerror}") from error
    if len(data) != num_bytes:
        raise ConfigError(f"{path} holds {len(data)} bytes; this rank owns {num_bytes}: record and replay must agree")
    if crc32(data) != entry["crc32"]:
        raise ConfigError(f"{path} does not have the checksum {entry['crc32']} of its log entry")
    return data
