"""What every layout must keep, whatever holds the masters; none of it needs DeepSpeed.

Put through the same: the layout that CONTRIBUTING.md shows, which is everything that its author has to write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from sidecast.errors import ConfigError
from sidecast.protos.shards import ShardSpec, coverage_error, total_elements
from sidecast.trainer.partitions import Layout, Partition, RollbackCopy, StalePartitionError
from sidecast.trainer.partitions.rollback import RollbackError, packed_bytes
from sidecast.trainer.partitions.trainable import trainable_parameters
from tests.support.fsdp_worlds import FSDP_WORLDS
from tests.support.layout_worlds import PADDING, WORLDS, Held, Make, Model, swap, true_weights
from tests.support.recipes import module_of

recipe = module_of('"""FSDP2', "row_sharded")


def local_of(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_sharded(kind: str, world_size: int) -> list[Held]:
    """What each rank would hold; the process group only counts ranks."""
    ranks = []
    for rank in range(world_size):
        distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            ranks.append(_rows_of(kind, rank, world_size))
        finally:
            distributed.destroy_process_group()
    return ranks


def _rows_of(kind: str, rank: int, world_size: int) -> Held:
    model, mesh = Model(kind), init_device_mesh("cpu", (world_size,))
    for name, full in true_weights(kind).items():
        rows = -(-full.shape[0] // world_size)
        local = full[rank * rows : (rank + 1) * rows].clone()
        sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())
        setattr(model, name, nn.Parameter(sharded))
    model.tied = model.wide
    optimizer = torch.optim.AdamW(model.trained, lr=0.1)

    def replace() -> None:
        old = model.wide
        model.wide = model.tied = nn.Parameter(old.detach().clone())
        swap(optimizer, old, model.wide)

    def masters() -> list[Tensor]:
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def map_layout() -> Layout:
        trainable = trainable_parameters(model, model.trained)
        return recipe.RowShardedLayout(trainable, optimizer, masters, rank=rank, world_size=world_size)

    def published(shard: ShardSpec) -> Tensor:
        return local_of(model.trained[shard.parameter]).detach().view(-1)

    return Held(
        map_layout=map_layout,
        optimizer=optimizer,
        locals=lambda: [local_of(parameter).detach() for parameter in model.trained],
        published=published,
        replace_master=replace,
    )


MAKERS: dict[str, Make] = {**WORLDS, **FSDP_WORLDS, "of the recipe": row_sharded}
SIZES = [("usual", 1), ("usual", 3), ("tiny", 5)]


class Counted:
    """A layout that counts how often it publishes."""

    def __init__(self, held: Held) -> None:
        self._held = held
        self.num_published = 0

    def __call__(self) -> Layout:
        layout: Any = self._held.map_layout()
        publish = layout.publish

        def counting() -> None:
            self.num_published += 1
            publish()

        layout.publish = counting
        return layout


def once(map_layout: Callable[[], Layout]) -> Callable[[], Layout]:
    """Maps once; whatever moves after that cannot be mapped."""
    layouts = [map_layout()]

    def map_once() -> Layout:
        if not layouts:
            raise ConfigError("gone")
        return layouts.pop()

    return map_once


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKERS[request.param]


@pytest.fixture(params=SIZES, ids=lambda size: f"{size[0]} on {size[1]}")
def size(request: pytest.FixtureRequest) -> tuple[str, int]:
    return request.param


def uploaded(partition: Partition) -> Tensor:
    out = torch.full((total_elements(partition.upload_shards),), torch.nan)
    partition.read(out)
    return out


def owned(partition: Partition) -> Tensor:
    out = torch.full((total_elements(partition.owned_shards),), torch.nan)
    partition.read_owned(out)
    return out


def invented(partition: Partition, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(total_elements(partition.owned_shards), generator=generator)


def pieces(shards: Sequence[ShardSpec], values: Tensor) -> list[tuple[ShardSpec, Tensor]]:
    return list(zip(shards, values.split([shard.numel for shard in shards]), strict=True)) if shards else []


def state_of(held: Held) -> list[Any]:
    """Masters with their padding, and the optimizer's state, copied."""
    entries = [
        {key: local_of(value).clone() for key, value in held.optimizer.state.get(master, {}).items()}
        for group in held.optimizer.param_groups
        for master in group["params"]
    ]
    return [[local.clone() for local in held.locals()], entries]


def assert_same_bits(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


def assert_published(held: Held, partition: Partition, values: Tensor) -> None:
    for shard, piece in pieces(partition.owned_shards, values):
        published = held.published(shard)
        assert_same_bits(published, piece.to(published.dtype))


def num_padding(held: Held) -> int:
    return sum(int((local == PADDING).sum()) for local in held.locals())


def uses_of(partition: Partition, copy: RollbackCopy) -> list[Callable[[], object]]:
    """Everything that looks at the optimizer's tensors or changes them."""
    return [
        partition.require_current,
        lambda: uploaded(partition),
        lambda: owned(partition),
        lambda: partition.apply(torch.ones(total_elements(partition.owned_shards)), 1.0),
        lambda: partition.capture(copy),
        lambda: partition.restore(copy),
        lambda: partition.require_restorable(copy),
        lambda: partition.scale_momentum(0.5),
        partition.reset_moments,
    ]


def test_every_element_is_read_exactly_once(make: Make, size: tuple[str, int]) -> None:
    kind, world_size = size
    true = true_weights(kind)
    partitions = [Partition(held.map_layout) for held in make(kind, world_size)]
    for partition in partitions:
        assert [(spec.fqn, spec.shape) for spec in partition.parameters] == [
            (name, tuple(values.shape)) for name, values in true.items()
        ]
        assert partition.aliases == {"tied": "wide"}
    numels = [values.numel() for values in true.values()]
    assert coverage_error(numels, [partition.upload_shards for partition in partitions]) is None
    flat = [values.view(-1) for values in true.values()]
    for partition in partitions:
        for read, shards in ((uploaded, partition.upload_shards), (owned, partition.owned_shards)):
            for shard, piece in pieces(shards, read(partition)):
                assert_same_bits(piece, flat[shard.parameter][shard.start : shard.stop])


def test_sums_of_bits_tell_values_apart_and_are_those_of_the_whole(make: Make, size: tuple[str, int]) -> None:
    partitions = [Partition(held.map_layout) for held in make(*size)]
    # Whoever holds the same, has the same sums; those of all that is held add up.
    sums = {partition.owned_shards: partition.checksums() for partition in partitions}
    assert all(sums[partition.owned_shards] == partition.checksums() for partition in partitions)
    whole = [int(values.view(torch.int32).sum(dtype=torch.int64)) for values in true_weights(size[0]).values()]
    assert [sum(column) for column in zip(*sums.values(), strict=True)] == whole
    for partition in partitions:
        # In shares, as pushes look at them.
        shares = [partition.checksums(first, 3) for first in range(3)]
        assert [sum(column) for column in zip(*shares, strict=True)] == partition.checksums()
        assert all(
            share[index] == 0 for first, share in enumerate(shares) for index in range(len(share)) if index % 3 != first
        )
    holding = [partition for partition in partitions if partition.owned_shards]
    assert all(partition.has_replicas == (len(sums) < len(holding)) for partition in partitions)
    partition = holding[0]
    delta = torch.zeros(total_elements(partition.owned_shards))
    delta[0] = 2.0**-10
    partition.apply(delta, 1.0)
    assert partition.checksums() != sums[partition.owned_shards]


def test_pieces_are_listed_as_they_lie_in_memory_so_that_neighbours_are_one_copy(
    make: Make, size: tuple[str, int]
) -> None:
    for held in make(*size):
        layout = held.map_layout()
        for fragments in (layout.owned, layout.upload):
            places = [(fragment.master, fragment.offset) for fragment in fragments]
            assert places == sorted(places)


def test_a_jump_reaches_masters_and_model_bit_for_bit(make: Make, size: tuple[str, int]) -> None:
    for held in make(*size):
        counted = Counted(held)
        partition = Partition(counted)
        delta, before = invented(partition, 1), owned(partition)
        base = invented(partition, 2)
        for weight in (0.3, 1.0):
            # Rounded twice, as on any processor: never a fused multiply-add.
            partition.apply(delta, weight)
            expected = before + delta * weight
            assert_same_bits(owned(partition), expected)
            assert_published(held, partition, expected)
            partition.apply(delta, weight, base=base)
            before = delta * weight + base
            assert_same_bits(owned(partition), before)
            assert_published(held, partition, before)
        # Also by a rank that owns nothing: the others wait for it.
        assert counted.num_published == 4


def test_padding_never_leaves_and_is_never_written(make: Make, size: tuple[str, int]) -> None:
    for held in make(*size):
        partition = Partition(held.map_layout)
        padding = num_padding(held)
        num_held = sum(local.numel() for local in held.locals())
        assert padding == num_held - total_elements(partition.owned_shards)
        assert PADDING not in uploaded(partition)
        assert PADDING not in owned(partition)
        partition.apply(invented(partition, 1), 1.0)
        assert num_padding(held) == padding


@pytest.mark.parametrize("name", ["windowed", "sharded"])
def test_there_is_padding_to_be_left_alone(name: str) -> None:
    assert all(num_padding(held) for held in MAKERS[name]("usual", 3)[-1:])
    assert any(total_elements(Partition(held.map_layout).owned_shards) == 0 for held in MAKERS[name]("tiny", 5))


def test_a_rollback_puts_back_masters_and_optimizer_state_and_publishes(make: Make, size: tuple[str, int]) -> None:
    for held in make(*size):
        counted = Counted(held)
        partition = Partition(counted)
        held.step()
        copy = RollbackCopy.allocate(partition.rollback_bytes())
        before, weights = state_of(held), owned(partition)
        locals_now, entries = before
        kept = [*locals_now, *(value for entry in entries for value in entry.values())]
        assert copy.num_bytes == packed_bytes(tensor.nbytes for tensor in kept)
        partition.capture(copy)
        partition.apply(invented(partition, 3), 1.0)
        held.step()
        partition.scale_momentum(0.5)
        if total_elements(partition.owned_shards):
            with pytest.raises(AssertionError):
                assert_same_bits(state_of(held), before)
        partition.require_restorable(copy)
        partition.restore(copy)
        assert_same_bits(state_of(held), before)
        assert_published(held, partition, weights)
        assert counted.num_published == 2


def test_a_rollback_to_before_the_first_step_removes_the_state_and_one_after_a_reset_makes_it_anew(
    make: Make, size: tuple[str, int]
) -> None:
    for held in make(*size):
        partition = Partition(held.map_layout)
        copy = RollbackCopy.allocate(partition.rollback_bytes())
        before = state_of(held)
        partition.capture(copy)
        held.step()
        partition.restore(copy)
        assert_same_bits(state_of(held), before)
        held.step()
        before = state_of(held)
        partition.capture(copy)
        kinds = [{key: type(value) for key, value in each.items()} for each in held.optimizer.state.values()]
        held.optimizer.state.clear()
        partition.restore(copy)
        assert_same_bits(state_of(held), before)
        made = [{key: type(value) for key, value in each.items()} for each in held.optimizer.state.values()]
        assert made == kinds
        held.step()


def test_reset_moments_are_those_of_before_the_first_step(make: Make, size: tuple[str, int]) -> None:
    for held in make(*size):
        partition = Partition(held.map_layout)
        held.step()
        partition.reset_moments()
        _, entries = state_of(held)
        # Torch's optimizers make it anew, where nobody else refers to it.
        assert all(entry.keys() in ({"step", "exp_avg", "exp_avg_sq"}, set()) for entry in entries)
        assert len(entries) == len(held.locals())
        assert not any(value.any() for entry in entries for value in entry.values())
        assert partition.learning_rates() == (0.1,)


def test_a_copy_of_nothing_is_not_restored(make: Make) -> None:
    (held,) = make("usual", 1)
    partition, before = Partition(held.map_layout), state_of(held)
    with pytest.raises(RollbackError, match="nothing was restored"):
        partition.restore(RollbackCopy.allocate(1 << 10))
    assert_same_bits(state_of(held), before)


def test_stale_tensors_are_refused_by_every_use(make: Make, size: tuple[str, int]) -> None:
    for held in make(*size):
        partition = Partition(once(held.map_layout))
        copy = RollbackCopy.allocate(partition.rollback_bytes())
        partition.capture(copy)
        held.replace_master()
        before = state_of(held)
        for use in uses_of(partition, copy):
            with pytest.raises(StalePartitionError, match="cannot be mapped anew: gone"):
                use()
        assert_same_bits(state_of(held), before)
        # What a step boundary asks in any case is told all the same.
        assert partition.rollback_bytes() == copy.num_bytes
        assert partition.learning_rates() == (0.1,)


def test_tensors_that_moved_are_mapped_anew(make: Make, size: tuple[str, int]) -> None:
    for held in make(*size):
        partition = Partition(held.map_layout)
        before, delta = owned(partition), invented(partition, 4)
        held.replace_master()
        partition.apply(delta, 1.0)
        assert_same_bits(owned(partition), before + delta)
        assert_published(held, partition, before + delta)
        changed = torch.cat([local.view(-1) for local in held.locals()])
        assert set(owned(partition).tolist()) <= set(changed.tolist())


@pytest.mark.parametrize(
    ("other", "what"), [(("usual", 3), "upload_shards"), (("tiny", 1), "parameters")], ids=["ranges", "model"]
)
def test_other_ranges_or_another_model_need_a_new_attach(make: Make, other: tuple[str, int], what: str) -> None:
    (held,) = make("usual", 1)
    layouts = iter([held.map_layout(), make(*other)[0].map_layout()])
    partition = Partition(lambda: next(layouts))
    before = owned(partition)
    with pytest.raises(StalePartitionError, match=f"rebuilt with other {what}; nowcasting needs a new attach"):
        partition.map_anew()
    # It still is what it was.
    assert_same_bits(owned(partition), before)


@pytest.mark.parametrize(
    "out", [torch.empty(22), torch.empty(23, dtype=torch.float64), torch.empty(1, 23)], ids=["size", "dtype", "shape"]
)
def test_a_buffer_that_does_not_fit_is_refused_before_anything_is_touched(make: Make, out: Tensor) -> None:
    (held,) = make("usual", 1)
    partition, before = Partition(held.map_layout), state_of(held)
    fitting = torch.zeros(23)
    uses: list[Callable[[], None]] = [
        lambda: partition.read(out),
        lambda: partition.read_owned(out),
        lambda: partition.apply(out, 1.0),
        lambda: partition.apply(fitting, 1.0, base=out),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"it must be float32 of shape \(23,\) on the CPU"):
            use()
    assert_same_bits(state_of(held), before)
