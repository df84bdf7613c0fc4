"""What the hook will allocate on a host, added up over its ranks, and refused before the first step if too much.

What is left is that of the host, or of the container that this process runs in.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sidecast.errors import ConfigError
from sidecast.protos.shards import total_elements
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.rollback_memory import keeps_rollback_copy
from sidecast.trainer.partitions import Partition

FP32_BYTES = 4
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """What one rank asks for.

    Attributes:
        host: Where; ranks with the same value share memory.
        needs_bytes: By purpose.
        available_bytes: On that host, as this rank sees it; None if it cannot tell.
    """

    host: str
    needs_bytes: Mapping[str, int]
    available_bytes: int | None


def needs_of(config: NowcasterConfig, partition: Partition) -> dict[str, int]:
    """Bytes of host memory that a rank's hook takes, by purpose; allocated at attach, none later."""
    owned_bytes = FP32_BYTES * total_elements(partition.owned_shards)
    needs = {
        "staging": config.num_slots * FP32_BYTES * total_elements(partition.upload_shards),
        "prediction": owned_bytes,
    }
    if config.wire_dtype == "bf16_delta":
        needs["reconstruction"] = FP32_BYTES * total_elements(partition.upload_shards)
    if config.merge == "replace":
        needs["base"] = owned_bytes
    if config.rollback == "host" and keeps_rollback_copy(config):
        needs["rollback"] = partition.rollback_bytes()
    return needs


def rank_memory(config: NowcasterConfig, partition: Partition) -> RankMemory:
    """What this rank asks for, and what it sees of its host."""
    return RankMemory(host=host_name(), needs_bytes=needs_of(config, partition), available_bytes=available_bytes())


def require_room(ranks: Sequence[RankMemory], max_host_memory_gib: float | None) -> None:
    """Refuses a budget that some host cannot bear; the same on every rank, given the same list.

    Args:
        ranks: What every rank asks for.
        max_host_memory_gib: What the settings allow per host; None: what is available there.

    Raises:
        ConfigError: With what is needed for what, what there is, and which settings need less.
    """
    for host in dict.fromkeys(rank.host for rank in ranks):
        local = [rank for rank in ranks if rank.host == host]
        purposes = dict.fromkeys(purpose for rank in local for purpose in rank.needs_bytes)
        needs = {purpose: sum(rank.needs_bytes.get(purpose, 0) for rank in local) for purpose in purposes}
        needed_bytes = sum(needs.values())
        seen = [rank.available_bytes for rank in local if rank.available_bytes is not None]
        limits = []
        if seen:
            limits.append((min(seen), "are available there"))
        if max_host_memory_gib is not None:
            limits.append((int(max_host_memory_gib * GIB), "are allowed by nowcaster.max_host_memory_gib"))
        if limits and needed_bytes > min(limits)[0]:
            limit_bytes, what = min(limits)
            parts = ", ".join(f"{purpose} {_gib(num_bytes)}" for purpose, num_bytes in needs.items())
            raise ConfigError(
                f"nowcasting needs {_gib(needed_bytes)} GiB of memory for the {len(local)} ranks on "
                f"{host.split()[-1]} ({parts}), but {_gib(limit_bytes)} GiB {what}; "
                "nowcaster.rollback 'disk' or 'off' needs less"
            )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3g}"


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
