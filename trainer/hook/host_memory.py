"""How much memory this host, or the container that this process runs in, has left."""

from __future__ import annotations

import socket
from pathlib import Path

# A process that cannot be limited sees one of these.
_UNLIMITED = ("max", "")


def host_name() -> str:
    """Names what the ranks share memory with: one machine, and one container on it."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{boot.read_text().strip() if boot.is_file() else ''} {socket.gethostname()}"


def available_bytes(root: Path = Path("/")) -> int | None:
    """What may still be allocated: the least of the host's and every enclosing control group's; None if unknown.

    Args:
        root: Where ``proc`` and ``sys`` are mounted.
    """
    found = [_host_bytes(root), *_group_bytes(root)]
    known = [item for item in found if item is not None]
    return min(known, default=None)


def _host_bytes(root: Path) -> int | None:
    for line in _text(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _group_bytes(root: Path) -> list[int]:
    """Of control groups version 2: this process's and those around it, as far as they can be seen."""
    mount = root / "sys/fs/cgroup"
    entry = next((line for line in _text(root / "proc/self/cgroup").splitlines() if line.startswith("0::/")), "0::/")
    group = mount / entry.removeprefix("0::/")
    left_bytes = []
    # Inside a container the path may be the host's, which is not there; what is mounted is then its own group.
    for folder in (mount, *(each for each in (group, *group.parents) if mount in each.parents)):
        limit = _text(folder / "memory.max").strip()
        if limit in _UNLIMITED:
            continue
        statistics = dict(line.split() for line in _text(folder / "memory.stat").splitlines())
        # Cached files count as used, and are given up when memory is wanted.
        used_bytes = int(_text(folder / "memory.current") or 0) - int(statistics.get("inactive_file", 0))
        left_bytes.append(max(0, int(limit) - used_bytes))
    return left_bytes


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
