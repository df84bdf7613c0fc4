"""What the hook will allocate on a host, added up over its ranks, and refused before the first step if too much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sidecast.errors import ConfigError
from sidecast.protos.shards import total_elements
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.host_memory import available_bytes, host_name
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
