"""Runs every case of FSDP2 in process groups of one to three ranks and writes down what it found.

Usage: python fsdp_worker.py FOLDER
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sidecast.protos.shards import ShardSpec, coverage_error, total_elements
from sidecast.trainer.partitions import Partition, RollbackCopy, StalePartitionError
from sidecast.trainer.partitions.plain import plain_layout, shard_again
from tests.integration.workers.fsdp_models import (
    CASES,
    Case,
    Small,
    batch,
    build,
    full_weights,
    held,
    load,
    save,
    train,
)

WORLD_SIZES = (1, 2, 3)


def of_all_ranks(value: Any) -> list[Any]:
    said = [None] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


def same_bits(first: Any, second: Any) -> bool:
    try:
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    except AssertionError:
        return False
    return True


class CaseRun:
    """One sharded model and the checks made on it, in order; each check leaves it fit for the next.

    Args:
        case: What to build.
        folder: Of this case, shared by the ranks.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.model, self.optimizer = build(case)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        self.partition = Partition(lambda: plain_layout(self.model, self.optimizer, rank=rank, world_size=world_size))
        self.numels = [spec.numel for spec in self.partition.parameters]

    def train(self, *steps: int) -> list[float]:
        losses = train(self.model, self.optimizer, steps, evaluates=self.case.evaluates)
        if self.case.evaluates:
            # A step boundary comes before it; here, what was evaluated last is to be looked at.
            shard_again(self.model, self.optimizer)
        return losses

    def snapshot(self) -> list[Tensor]:
        """Every parameter, flat and whole, assembled from what all ranks upload."""
        out = torch.full((total_elements(self.partition.upload_shards),), torch.nan)
        self.partition.read(out)
        full = [torch.full((numel,), torch.nan) for numel in self.numels]
        for shards, values in of_all_ranks((self.partition.upload_shards, out)):
            for shard, piece in zip(shards, values.split([shard.numel for shard in shards]), strict=True):
                full[shard.parameter][shard.start : shard.stop] = piece
        return full

    def cut(self, full: list[Tensor], shards: tuple[ShardSpec, ...]) -> Tensor:
        return torch.cat([torch.empty(0), *(full[s.parameter][s.start : s.stop] for s in shards)])

    def invented(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(numel, generator=generator) * 0.05 for numel in self.numels]

    def named(self, full: list[Tensor]) -> dict[str, Tensor]:
        """Trained parameters by every name that they have."""
        weights = {
            spec.fqn: values.view(spec.shape) for spec, values in zip(self.partition.parameters, full, strict=True)
        }
        return weights | {alias: weights[fqn] for alias, fqn in self.partition.aliases.items()}

    # The checks.

    def every_element_is_uploaded_once(self) -> None:
        assert coverage_error(self.numels, of_all_ranks(self.partition.upload_shards)) is None
        listed = of_all_ranks((self.partition.parameters, dict(self.partition.aliases)))
        assert all(each == listed[0] for each in listed)
        assert self.partition.aliases == {"head.weight": "embed.weight"}
        assert not any(spec.fqn.startswith("frozen") for spec in self.partition.parameters)
        num_owned = sum(of_all_ranks(total_elements(self.partition.owned_shards)))
        num_copies = dist.get_world_size() if self.case.has_replicas else 1
        assert num_owned == num_copies * sum(self.numels)
        assert self.partition.rollback_bytes() > 0

    def a_snapshot_is_the_full_state_dict(self) -> None:
        for steps in ((), (0, 1)):
            self.train(*steps)
            ours, true = self.named(self.snapshot()), full_weights(self.model)
            assert {name for name in true if not name.startswith("frozen")} == ours.keys()
            for name, values in ours.items():
                assert values.dtype == true[name].dtype == torch.float32
                assert same_bits(values, true[name]), name

    def a_jump_reaches_the_model(self) -> None:
        before, delta = self.snapshot(), self.invented(1)
        local = self.cut(delta, self.partition.owned_shards)
        self.partition.apply(local, 0.3)
        expected = [now + step * 0.3 for now, step in zip(before, delta, strict=True)]
        assert same_bits(self.snapshot(), expected)
        whole = Small()
        whole.load_state_dict(full_weights(self.model))
        assert same_bits(dict(whole.named_parameters())["embed.weight"].detach(), self.named(expected)["embed.weight"])
        policy = self.case.options.get("mp_policy")
        whole.to(torch.float32 if policy is None else policy.param_dtype)
        with torch.no_grad():
            assert same_bits(self.model(batch(9, 0)), whole(batch(9, 0)))
        shard_again(self.model, self.optimizer)
        base = self.cut(before, self.partition.owned_shards)
        self.partition.apply(local, 0.5, base=base)
        assert same_bits(self.snapshot(), [step * 0.5 + then for then, step in zip(before, delta, strict=True)])

    def a_rollback_is_bit_for_bit(self) -> None:
        copy = RollbackCopy.allocate(self.partition.rollback_bytes())
        before, weights = held(self.optimizer), full_weights(self.model)
        self.partition.capture(copy)
        straight = self.train(2, 3)
        assert not same_bits(before, held(self.optimizer))
        self.partition.apply(self.cut(self.invented(2), self.partition.owned_shards), 1.0)
        self.train(4)
        self.partition.scale_momentum(0.5)
        # Through a checkpoint, as when a run is saved on probation.
        path = self.folder.with_suffix(f".rank{dist.get_rank()}")
        torch.save(copy.state_dict(), path)
        copy.clear()
        copy.load_state_dict(torch.load(path, weights_only=True))
        self.partition.require_restorable(copy)
        self.partition.restore(copy)
        assert same_bits(before, held(self.optimizer))
        assert same_bits(weights, full_weights(self.model))
        assert self.train(2, 3) == straight

    def moments_are_reset_and_made_anew(self) -> None:
        self.partition.require_resettable()
        self.partition.reset_moments()
        for _, entries in held(self.optimizer):
            assert not any(torch.as_tensor(value).any() for value in entries.values())
        self.train(5)
        assert len(self.partition.learning_rates()) == 1

    def a_distributed_checkpoint_is_mapped_anew(self) -> None:
        save(self.model, self.optimizer, self.folder)
        saved, kept = self.snapshot(), held(self.optimizer)
        self.train(6)
        load(self.model, self.optimizer, self.folder)
        self.partition.map_anew()
        assert same_bits(self.snapshot(), saved)
        assert same_bits(held(self.optimizer), kept)
        values = self.invented(3)
        zeros = torch.zeros(total_elements(self.partition.owned_shards))
        self.partition.apply(zeros, 0.0, base=self.cut(values, self.partition.owned_shards))
        assert same_bits(self.named(values)["few"], full_weights(self.model)["few"])

    def gathered_parameters_are_refused_until_they_are_sharded_again(self) -> None:
        expected = self.snapshot()
        self.model.unshard()
        for use in (self.partition.require_current, self.snapshot):
            with pytest.raises(StalePartitionError, match="gathered now, not sharded"):
                use()
        shard_again(self.model, self.optimizer)
        assert same_bits(self.snapshot(), expected)


CHECKS = (
    CaseRun.every_element_is_uploaded_once,
    CaseRun.a_snapshot_is_the_full_state_dict,
    CaseRun.a_jump_reaches_the_model,
    CaseRun.a_rollback_is_bit_for_bit,
    CaseRun.moments_are_reset_and_made_anew,
    CaseRun.a_distributed_checkpoint_is_mapped_anew,
    CaseRun.gathered_parameters_are_refused_until_they_are_sharded_again,
)


def run_case(case: Case, folder: Path) -> dict[str, str | None]:
    """Runs the checks of one case; the first failure ends it, as later checks build on earlier ones."""
    found: dict[str, str | None] = {}
    run = CaseRun(case, folder)
    for check in CHECKS:
        failure = None
        try:
            check(run)
        except AssertionError as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            failure = f"line {trace.tb_lineno if trace else 0}: {error}"
        failures = [each for each in of_all_ranks(failure) if each is not None]
        found[check.__name__] = failures[0] if failures else None
        if failures:
            break
    return found


def run_rank(rank: int, world_size: int, folder: Path) -> None:
    """One rank of one world size."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    for name, case in CASES.items():
        found = run_case(case, folder / name)
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def main(scratch: Path) -> None:
    """Every world size after the other; ranks are forked, as importing torch takes longer than all their checks."""
    forked = multiprocessing.get_context("fork")
    for world_size in WORLD_SIZES:
        folder = scratch / f"{world_size}"
        folder.mkdir()
        ranks = [forked.Process(target=run_rank, args=(rank, world_size, folder)) for rank in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
