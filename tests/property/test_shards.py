"""Any way to divide a model among ranks: covered once, and every byte where it belongs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.assembly import RankPlan
from sidecast.nowcaster_service.errors import MalformedError
from sidecast.protos.shards import ShardSpec, coverage_error, total_elements

Divided = tuple[ModelManifest, list[list[ShardSpec]]]


@st.composite
def divided_models(draw: st.DrawFn) -> Divided:
    """Parameters cut at random places, the pieces dealt out and shuffled."""
    numels = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5))
    num_ranks = draw(st.integers(1, 4))
    pieces = []
    for parameter, numel in enumerate(numels):
        cuts = sorted({0, numel, *draw(st.lists(st.integers(0, numel), max_size=4))})
        pieces += [ShardSpec(parameter, start, stop) for start, stop in itertools.pairwise(cuts)]
    owners = draw(st.lists(st.integers(0, num_ranks - 1), min_size=len(pieces), max_size=len(pieces)))
    order = draw(st.permutations(range(len(pieces))))
    ranks: list[list[ShardSpec]] = [[] for _ in range(num_ranks)]
    for index in order:
        ranks[owners[index]].append(pieces[index])
    return ModelManifest.from_shapes((f"p{i}", (numel,)) for i, numel in enumerate(numels)), ranks


@given(divided=divided_models(), chunk_elements=st.integers(1, 20), data=st.data())
def test_what_all_ranks_scatter_they_gather_again(divided: Divided, chunk_elements: int, data: st.DataObject) -> None:
    manifest, ranks = divided
    assert coverage_error([spec.numel for spec in manifest.parameters], ranks) is None
    vector = np.arange(manifest.num_elements, dtype=np.float32)
    assembled = bytearray(b"\xff" * (4 * manifest.num_elements))
    for shards in ranks:
        offsets = [manifest.offsets[f"p{shard.parameter}"] + shard.start for shard in shards]
        local = b"".join(
            vector[start : start + shard.numel].tobytes() for start, shard in zip(offsets, shards, strict=True)
        )
        plan = RankPlan(manifest, shards)
        assert plan.num_bytes == len(local) == 4 * total_elements(shards)
        starts = list(range(0, len(local), 4 * chunk_elements))
        for start in data.draw(st.permutations(starts)):
            plan.scatter(memoryview(assembled), start, memoryview(local)[start : start + 4 * chunk_elements])
        for start in starts:
            length = min(4 * chunk_elements, len(local) - start)
            assert plan.gather(memoryview(vector).cast("B"), start, length) == local[start : start + length]
        with pytest.raises(MalformedError, match="outside this rank's buffer"):
            plan.gather(memoryview(assembled), len(local), 4)
    assert bytes(assembled) == vector.tobytes()


@given(divided=divided_models(), data=st.data())
def test_a_missing_or_doubled_element_is_noticed(divided: Divided, data: st.DataObject) -> None:
    manifest, ranks = divided
    numels = [spec.numel for spec in manifest.parameters]
    owners = [rank for rank, shards in enumerate(ranks) if shards]
    if not owners:
        return
    rank = data.draw(st.sampled_from(owners))
    shard = ranks[rank].pop(data.draw(st.integers(0, len(ranks[rank]) - 1)))
    fault = coverage_error(numels, ranks)
    assert fault is not None
    assert f"elements {shard.start} to {shard.stop} of parameter {shard.parameter}" in fault or "no rank holds" in fault
    ranks[rank] += [shard, ShardSpec(shard.parameter, shard.start, shard.start + 1)]
    assert "held twice" in str(coverage_error(numels, ranks))
    ranks[rank][-1] = ShardSpec(shard.parameter, 0, numels[shard.parameter] + 1)
    assert "which has" in str(coverage_error(numels, ranks))
