"""Ranks that hold the same elements must hold the same values: of what all hold each uploads a part, and applies all.

Torch broadcasts a model when DDP is put around it, DeepSpeed when it makes an engine. Nobody does for a plain module
in a process group, whose ranks may begin with seeds of their own, or never exchange gradients.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sidecast.errors import ConfigError
from sidecast.trainer.hook.ranks import Ranks
from sidecast.trainer.hook.vote import NO_VALUES
from sidecast.trainer.partitions import Partition


def require_equal_replicas(partition: Partition, ranks: Ranks) -> None:
    """Refuses ranks that hold the same elements with other values; collective.

    Args:
        partition: What this rank holds.
        ranks: All of them.

    Raises:
        ConfigError: Naming a parameter that differs, and between which ranks. All ranks raise together.
    """
    if ranks.world_size == 1:
        return
    sums: list[int] = []
    with ranks.refused_together():
        sums = partition.checksums() if partition.has_replicas else []
    said = ranks.gather((shards_digest(partition), _digest(sums)))
    first_of: dict[str, int] = {}
    pairs = [(first_of.setdefault(shards, rank), rank) for rank, (shards, _) in enumerate(said)]
    different = next(((first, rank) for first, rank in pairs if said[first][1] != said[rank][1]), None)
    if different is None:
        return
    # Only where they differ, all sums are exchanged.
    all_sums = ranks.gather(sums)
    first, rank = different
    pairs_of_sums = zip(partition.parameters, all_sums[first], all_sums[rank], strict=True)
    fqn = next(spec.fqn for spec, one, other in pairs_of_sums if one != other)
    raise ConfigError(
        f"parameter {fqn!r} has other values on rank {rank} than on rank {first}, and a nowcast would mix them; put "
        "DistributedDataParallel around the model before sidecast.attach, or broadcast it from rank 0 and average its "
        "gradients; ranks that train models of their own need a process group each"
    )


def replica_values(partition: Partition, first: int = 0, every: int = 1) -> tuple[int, int]:
    """What a rank holds that others hold, too, and its values, as digests of 63 bits for a confirmation; local.

    Args:
        partition: What it holds.
        first: Index of the first parameter whose values count.
        every: Of it and those after it, each so-manieth counts.

    Raises:
        StalePartitionError: The optimizer's tensors are away now.
    """
    if not partition.has_replicas:
        return NO_VALUES
    return _number(shards_digest(partition)), _number(_digest(partition.checksums(first, every)))


def shards_digest(partition: Partition) -> str:
    """Of which elements a rank applies."""
    return _digest([(shard.parameter, shard.start, shard.stop) for shard in partition.owned_shards])


def _digest(value: Sequence[object]) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()


def _number(digest: str) -> int:
    return int(digest, 16) >> 65
