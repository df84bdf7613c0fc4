"""The apply log: what was done to the weights and when, enough to replay a run without a service.

One folder per run. ``applied-rank0.jsonl`` holds one JSON object per line: ``action`` (``applied`` or
``rolled_back``), ``step``, and for jumps ``version``, ``digest``, ``weight``, ``base_step``, ``horizon_intervals``,
``file`` and ``crc32``; the file holds the rank's delta as raw little-endian fp32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

from sidecast.errors import ConfigError


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

    def record(self, entry: Mapping[str, Any], delta: memoryview | None) -> None:
        """Appends an entry, after writing the delta that it applied, if it did."""
        line = dict(entry)
        if delta is not None:
            name = f"delta-step{entry['step']:08d}-rank{self._rank}.f32"
            (self._folder / name).write_bytes(delta)
            line |= {"file": name, "crc32": crc32(delta)}
        with log_path(self._folder, self._rank).open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def read_log(folder: Path, rank: int) -> list[dict[str, Any]]:
    """A rank's entries, oldest first.

    Raises:
        ConfigError: There is no log of this rank.
    """
    path = log_path(folder, rank)
    if not path.is_file():
        raise ConfigError(f"nowcaster.replay_dir {folder} has no {path.name}; it was recorded with fewer ranks")
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_delta(folder: Path, entry: Mapping[str, Any], num_bytes: int) -> bytearray:
    """The delta that an entry applied.

    Raises:
        ConfigError: It is not the one that was recorded, or was recorded with other partitions.
    """
    path = folder / entry["file"]
    data = bytearray(path.read_bytes())
    if len(data) != num_bytes:
        raise ConfigError(f"{path} holds {len(data)} bytes; this rank owns {num_bytes}: record and replay must agree")
    if crc32(data) != entry["crc32"]:
        raise ConfigError(f"{path} does not have the checksum {entry['crc32']} of its log entry")
    return data
