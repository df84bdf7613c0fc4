"""FSDP2's layout: which slabs a rank holds of any mesh and placement, and which models it refuses, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sidecast.errors import ConfigError
from sidecast.protos.shards import ShardSpec, coverage_error, total_elements
from sidecast.trainer.partitions import Partition
from sidecast.trainer.partitions.layouts.placed import Place
from sidecast.trainer.partitions.plain import plain_layout
from tests.support.fsdp_worlds import fake_group


class Net(nn.Module):
    """Two layers, whose sizes four ranks divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(inputs))
        return out


def partition_of(model: nn.Module, rank: int, world_size: int, parameters: Any = None) -> Partition:
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=0.1)
    return Partition(lambda: plain_layout(model, optimizer, rank=rank, world_size=world_size))


@pytest.mark.parametrize("dim", [0, 1, 2, None])
@pytest.mark.parametrize("num_slabs", [1, 2, 3, 4])
def test_slabs_lie_where_chunk_cuts_them(dim: int | None, num_slabs: int) -> None:
    whole = torch.arange(60).view(3, 4, 5)
    chunks = (whole,) * num_slabs if dim is None else whole.chunk(num_slabs, dim)
    for index in range(num_slabs):
        place = Place(dim, index, num_slabs, 0, 1)
        mine = chunks[index] if index < len(chunks) else whole[:0]
        ranges = place.ranges(whole.shape)
        assert torch.equal(
            torch.cat([torch.empty(0, dtype=whole.dtype), *(whole.view(-1)[start:stop] for start, stop in ranges)]),
            mine.flatten(),
        )


def test_slabs_that_touch_are_one_range() -> None:
    assert Place(0, 1, 2, 0, 1).ranges((4, 3, 5)) == [(30, 60)]
    assert Place(1, 0, 1, 0, 1).ranges((4, 3)) == [(0, 12)]
    assert Place(1, 1, 2, 0, 1).ranges((2, 4)) == [(2, 4), (6, 8)]
    assert Place(0, 4, 5, 0, 1).ranges((2, 3)) == []


@pytest.mark.parametrize("columns", [False, True])
def test_replicas_share_the_upload_and_each_applies_its_slab(columns: bool) -> None:
    true = dict(Net().named_parameters())
    partitions = []
    for rank in range(4):
        with fake_group(rank, 4):
            model = Net()

            def place(parameter: nn.Parameter) -> Shard | None:
                return Shard(1) if columns and parameter.dim() == 2 else None

            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
            partitions.append(partition_of(fully_shard(model, mesh=mesh, shard_placement_fn=place), rank, 4))
    numels = [spec.numel for spec in partitions[0].parameters]
    assert [spec.fqn for spec in partitions[0].parameters] == list(true)
    assert coverage_error(numels, [each.upload_shards for each in partitions]) is None
    # Ranks 0 and 2 hold the same, ranks 1 and 3 the rest.
    assert partitions[0].owned_shards == partitions[2].owned_shards
    for pair in (partitions[:2], partitions[2:]):
        assert coverage_error(numels, [each.owned_shards for each in pair]) is None
    assert {total_elements(each.upload_shards) for each in partitions} == {sum(numels) // 4}
    for each in partitions:
        out = torch.empty(total_elements(each.upload_shards))
        each.read(out)
        assert torch.equal(out, _cut(each.upload_shards, [values.detach().view(-1) for values in true.values()]))


def _cut(shards: tuple[ShardSpec, ...], full: list[Tensor]) -> Tensor:
    return torch.cat([full[shard.parameter][shard.start : shard.stop] for shard in shards])


def tensor_parallel(model: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def tensor_parallel_alone(model: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    return parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def one_stage_of_a_pipeline(model: nn.Module) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    return fully_shard(model, mesh=mesh["dp"])


def half_sharded(model: Any) -> Any:
    fully_shard(model.up)
    return model


def low_precision(model: nn.Module) -> Any:
    return fully_shard(model.bfloat16())


def cut_by_hand(model: Any) -> Any:
    fully_shard(model)
    weight = model.up.weight
    model.up.weight = nn.Parameter(distribute_tensor(torch.zeros(8, 4), weight.device_mesh, [Shard(0)]))
    model.up.weight._local_tensor = torch.zeros(3, 4)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tensor_parallel, r"'up.weight' is placed as .* on mesh \(dp=2, tp=2\): tensor or expert parallelism; now"),
        (
            tensor_parallel_alone,
            r"DTensors that fully_shard has not made \(tensor parallelism\?\); nowcasting supports",
        ),
        (
            one_stage_of_a_pipeline,
            r"'up.weight' lies on 2 of 4 ranks, on mesh \(dp=2\) of \(pp=2, dp=2\): tensor, pipeline or expert",
        ),
        (half_sharded, r"'down.weight' is trained, but fully_shard has left it out \(ignored_params, or not called on"),
        (low_precision, r"'up.weight' is torch.bfloat16 and has no fp32 master; .* MixedPrecisionPolicy\(param_dtype="),
        (cut_by_hand, r"'up.weight' has 12 elements on this rank, where its placements say 8; nowcasting supports"),
    ],
)
def test_what_is_no_data_parallelism_of_fp32_shards_is_refused_by_name(
    build: Callable[[nn.Module], Any], message: str
) -> None:
    with fake_group(0, 4), pytest.raises(ConfigError, match=message) as refusal:
        partition_of(build(Net()), 0, 4)
    assert "\n" not in str(refusal.value)


def test_an_optimizer_from_before_the_sharding_is_refused() -> None:
    with fake_group(0, 4):
        model = Net()
        before = list(model.parameters())
        fully_shard(model)
        with pytest.raises(ConfigError, match="holds none of the model's sharded parameters; make it after"):
            partition_of(model, 0, 4, before)


def test_tensor_parallelism_along_another_dimension_is_refused_too() -> None:
    with fake_group(0, 4):
        model: Any = tensor_parallel(Net())
        with pytest.raises(ConfigError, match=r"'down.weight' is placed as \(Shard\(dim=0\), Shard\(dim=1\)\) on mesh"):
            partition_of(model, 0, 4, [model.down.weight])
