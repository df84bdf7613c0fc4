"""Small models as ``fully_shard`` leaves them on every rank, made in one process: a fake group counts ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore

from sidecast.protos.shards import ShardSpec
from sidecast.trainer.partitions.plain import plain_layout
from tests.support.layout_worlds import Held, Make, Model, swap


@contextlib.contextmanager
def fake_group(rank: int, world_size: int) -> Iterator[None]:
    """Inside, this process is a rank of so many that talk to nobody."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    # What torch has cached of operations knows the meshes of an earlier rank, which equal this one's but for the rank.
    _clear_sharding_prop_cache()
    try:
        yield
    finally:
        dist.destroy_process_group()


def local_of(tensor: Tensor) -> Tensor:
    """This rank's memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_by(mesh_shape: Callable[[int], Sequence[int]]) -> Make:
    """Models sharded over a mesh of this shape for so many ranks, of which the last dimension is that of the shards."""

    def make(kind: str, world_size: int) -> list[Held]:
        ranks = []
        for rank in range(world_size):
            with fake_group(rank, world_size):
                ranks.append(_held(kind, rank, world_size, tuple(mesh_shape(world_size))))
        return ranks

    return make


def _held(kind: str, rank: int, world_size: int, mesh_shape: tuple[int, ...]) -> Held:
    model = Model(kind)
    # HSDP needs names.
    names = ("replicas", "shards")[-len(mesh_shape) :]
    fully_shard(model, mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names))
    optimizer = torch.optim.AdamW(model.trained, lr=0.1)

    def replace() -> None:
        _clear_sharding_prop_cache()
        old = model.wide
        model.wide = model.tied = nn.Parameter(old.detach().clone())
        swap(optimizer, old, model.wide)

    def published(shard: ShardSpec) -> Tensor:
        return local_of(model.trained[shard.parameter]).detach().view(-1)

    return Held(
        map_layout=lambda: plain_layout(model, optimizer, rank=rank, world_size=world_size),
        optimizer=optimizer,
        locals=lambda: [local_of(parameter).detach() for parameter in model.trained],
        published=published,
        replace_master=replace,
    )


FSDP_WORLDS: dict[str, Make] = {
    "fsdp2": sharded_by(lambda world_size: (world_size,)),
    "hsdp": sharded_by(lambda world_size: (world_size, 1)),
}
