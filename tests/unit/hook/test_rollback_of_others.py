"""A checkpoint's rollback copy is taken by the rank whose shards it is of, and by no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sidecast.protos.shards import ShardSpec
from sidecast.trainer.hook.application import JumpApplier
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.partitions import RollbackCopy
from sidecast.trainer.partitions.rollback import RollbackError
from tests.support.hook_harness import FakePartition, OneVoter


def applier_of(*shards: ShardSpec) -> JumpApplier:
    partition: Any = FakePartition()
    partition.owned_shards = shards
    voter: Any = OneVoter()
    return JumpApplier(NowcasterConfig(), partition, voter, RollbackCopy.allocate(64))


@pytest.fixture
def saved() -> dict[str, Any]:
    applier = applier_of(ShardSpec(0, 0, 2))
    assert applier.rollback_copy is not None
    applier.rollback_copy.save({"0": torch.tensor([3.0, 4.0])}, {})
    return applier.rollback_state()


def test_the_rank_that_saved_it_takes_it(saved: dict[str, Any]) -> None:
    applier = applier_of(ShardSpec(0, 0, 2))
    applier.load_rollback_copy(saved)
    assert applier.rollback_copy is not None
    assert applier.rollback_copy.tensors()["0"].tolist() == [3.0, 4.0]


@pytest.mark.parametrize("other", [(ShardSpec(0, 2, 4),), (ShardSpec(0, 0, 1), ShardSpec(0, 1, 2)), ()])
def test_a_rank_with_other_shards_does_not(saved: dict[str, Any], other: tuple[ShardSpec, ...]) -> None:
    applier = applier_of(*other)
    with pytest.raises(RollbackError, match="of other shards than this rank's"):
        applier.load_rollback_copy(saved)
    assert applier.rollback_copy is not None
    assert applier.rollback_copy.is_empty


def test_a_copy_from_before_it_said_whose_it_is_is_taken(saved: dict[str, Any]) -> None:
    del saved["shards"]
    applier = applier_of(ShardSpec(0, 2, 4))
    applier.load_rollback_copy(saved)
    assert applier.rollback_copy is not None
    assert not applier.rollback_copy.is_empty
