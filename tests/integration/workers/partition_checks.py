"""The checks that are made on the partition of every case's engine, one after another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import Tensor, nn
from torch import distributed as dist

from sidecast.errors import ConfigError
from sidecast.protos.shards import ShardSpec, coverage_error, total_elements
from sidecast.trainer.partitions import Layout, Partition, RollbackCopy, StalePartitionError
from sidecast.trainer.partitions.deepspeed import layout_of
from tests.integration.workers.partition_account import (
    MASTER_LISTS,
    digest,
    masters_of,
    module_weights,
    of_all_ranks,
    optimizer_state_of,
    reference_snapshot,
    same_bits,
)
from tests.integration.workers.partition_cases import Case
from tests.integration.workers.partition_engines import DTYPES, build_engine, train

STATE_PARTS = ("masters", "moments and counters", "weights", "loss scale")


class CaseRun:
    """One engine and the checks made on it, in order; each check leaves the engine fit for the next.

    Args:
        case: What to build.
        folder: Scratch folder of this case, shared by the ranks.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.folder = folder
        self.engine = build_engine(case)
        self.partition = self.mapped()
        self.partition.require_current()
        self.numels = [spec.numel for spec in self.partition.parameters]
        self.dtype = DTYPES[case.dtype]

    def mapped(self) -> Partition:
        return Partition(lambda: layout_of(self.engine))

    def mapped_once(self) -> Partition:
        """One that cannot map itself anew, so that it refuses whatever it finds moved."""
        layouts = [layout_of(self.engine)]

        def map_layout() -> Layout:
            if not layouts:
                raise ConfigError("mapped once")
            return layouts.pop()

        return Partition(map_layout)

    def read(self) -> Tensor:
        out = torch.full((total_elements(self.partition.upload_shards),), torch.nan)
        self.partition.read(out)
        return out

    def snapshot(self) -> list[Tensor]:
        """Every parameter, flat and whole, assembled from what all ranks upload."""
        full = [torch.full((numel,), torch.nan) for numel in self.numels]
        for shards, values in of_all_ranks((self.partition.upload_shards, self.read())):
            for shard, piece in zip(shards, values.split([shard.numel for shard in shards]), strict=True):
                full[shard.parameter][shard.start : shard.stop] = piece
        return full

    def cut(self, full: list[Tensor], shards: tuple[ShardSpec, ...]) -> Tensor:
        return torch.cat([torch.empty(0), *(full[s.parameter][s.start : s.stop] for s in shards)])

    def write(self, values: Tensor) -> None:
        """Sets the owned elements: to a base from which the jump has no length."""
        self.partition.apply(torch.zeros_like(values), 0.0, base=values)

    def invented(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(numel, generator=generator) * 0.05 for numel in self.numels]

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            raise AssertionError(message)

    def require_model_equals(self, full: list[Tensor]) -> None:
        weights = module_weights(self.engine)
        for spec, values in zip(self.partition.parameters, full, strict=True):
            expected = values.to(self.master_dtype()).to(self.dtype).view(spec.shape)
            self.require(same_bits(weights[spec.fqn], expected), f"model's {spec.fqn} is not what was published")

    def master_dtype(self) -> torch.dtype:
        return self.partition.master_dtype

    def everything(self) -> list[Any]:
        masters = [master.detach().clone() for master in masters_of(self.engine)]
        scale = getattr(self.engine.optimizer, "loss_scale", None)
        return [masters, optimizer_state_of(self.engine), module_weights(self.engine), scale]

    def require_equal_state(self, before: list[Any]) -> None:
        for old, new, what in zip(before, self.everything(), STATE_PARTS, strict=True):
            self.require(same_bits(old, new), f"{what} differ from what was captured")

    # The checks.

    def rollback_before_first_step(self) -> None:
        # DeepSpeed's half-precision optimizers of stage 0 step once with zero gradients when they are made; weight
        # decay alone then moves the masters away from the model. Publishing makes the two agree.
        self.write(self.cut(self.snapshot(), self.partition.owned_shards))
        copy = RollbackCopy.allocate(self.partition.rollback_bytes())
        before = self.everything()
        self.partition.capture(copy)
        train(self.engine, range(1))
        self.require(not same_bits(before, self.everything()), "training changed nothing, the check is void")
        self.partition.restore(copy)
        self.require_equal_state(before)

    def coverage(self) -> None:
        train(self.engine, range(2))
        shards = of_all_ranks(self.partition.upload_shards)
        self.require(coverage_error(self.numels, shards) is None, str(coverage_error(self.numels, shards)))
        listed = of_all_ranks((self.partition.parameters, dict(self.partition.aliases)))
        self.require(all(each == listed[0] for each in listed), "ranks list different parameters")
        owned = of_all_ranks(self.partition.owned_shards)
        if self.case.stage == 0:
            for each in owned:
                self.require(coverage_error(self.numels, [each]) is None, "a rank does not own everything at stage 0")
        else:
            self.require(owned == shards, "owned and uploaded shards differ")

    def snapshot_equals_reference(self) -> None:
        specs, full = self.partition.parameters, self.snapshot()
        assembled = {spec.fqn: values.view(spec.shape) for spec, values in zip(specs, full, strict=True)}
        assembled |= {alias: assembled[fqn] for alias, fqn in self.partition.aliases.items()}
        reference = reference_snapshot(self.engine, self.case, self.folder)
        self.require(assembled.keys() == reference.keys(), f"{assembled.keys() ^ reference.keys()} on one side only")
        for name, values in assembled.items():
            self.require(same_bits(values, reference[name]), f"{name} differs from DeepSpeed's own account")

    def written_values_read_back(self) -> None:
        num_held = sum(master.numel() for master in masters_of(self.engine))
        padding = num_held - total_elements(self.partition.owned_shards)
        paddings = of_all_ranks(padding)
        target = [values + 0.5 for values in self.invented(1)]
        untouched = -77.0
        for master in masters_of(self.engine):
            master.data.fill_(untouched)
        self.write(self.cut(target, self.partition.owned_shards))
        expected = [values.to(self.master_dtype()).float() for values in target]
        self.require(same_bits(self.snapshot(), expected), "values read back are not the values written")
        self.require_model_equals(target)
        masters = masters_of(self.engine)
        left = sum(int((master == untouched).sum()) for master in masters)
        if self.case.stage > 0 and dist.get_world_size() > 1 and not self.case.frozen:
            self.require(any(paddings), "no rank has padding, the check is void")
        self.require(left == padding, f"{left} elements untouched, but the padding has {padding}")
        for master in masters:
            master.data.masked_fill_(master == untouched, 0.0)

    def applied_delta_is_published(self) -> None:
        before, delta = self.snapshot(), self.invented(2)
        local = self.cut(delta, self.partition.owned_shards)
        self.partition.apply(local, 0.3)
        added = [(now + step * 0.3).to(self.master_dtype()).float() for now, step in zip(before, delta, strict=True)]
        self.require(same_bits(self.snapshot(), added), "a jump from now did not give now + weight * delta")
        self.require_model_equals(added)
        base = self.cut(before, self.partition.owned_shards)
        if self.case.stage == 3:
            # As a forward pass outside of training leaves them; in most cases all of them stay gathered anyway.
            for parameter in self.engine.module.parameters():
                parameter.all_gather()
        self.partition.apply(local, 0.5, base=base)
        replaced = [
            (step * 0.5 + then).to(self.master_dtype()).float() for then, step in zip(before, delta, strict=True)
        ]
        self.require(same_bits(self.snapshot(), replaced), "a jump from a base did not give base + weight * delta")
        self.require_model_equals(replaced)

    def training_goes_on_equally(self) -> None:
        before = digest(module_weights(self.engine))
        train(self.engine, range(2, 4))
        after = of_all_ranks(digest(module_weights(self.engine)))
        self.require(after[0] != before, "training changed nothing, the check is void")
        self.require(len(set(after)) == 1, "ranks hold different weights after a step that followed an apply")

    def rollback_is_bit_identical(self) -> None:
        copy = RollbackCopy.allocate(self.partition.rollback_bytes())
        before = self.everything()
        self.partition.capture(copy)
        self.partition.apply(self.cut(self.invented(3), self.partition.owned_shards), 1.0)
        train(self.engine, range(4, 8))
        changed = self.everything()
        for old, new, what in zip(before, changed, STATE_PARTS, strict=True):
            unchangeable = (what == STATE_PARTS[-1] and self.case.dtype != "fp16") or total_elements(
                self.partition.owned_shards
            ) == 0
            self.require(unchangeable or not same_bits(old, new), f"{what} did not change, the check is void")
        # Through a checkpoint, as when a run is saved on probation.
        torch.save(copy.state_dict(), self.folder.with_suffix(f".rank{dist.get_rank()}"))
        copy.clear()
        copy.load_state_dict(torch.load(self.folder.with_suffix(f".rank{dist.get_rank()}"), weights_only=True))
        self.partition.restore(copy)
        self.require_equal_state(before)
        train(self.engine, range(8, 9))
        alike = of_all_ranks(digest(module_weights(self.engine)))
        self.require(len(set(alike)) == 1, "ranks hold different weights after a step that followed a rollback")

    def moments_policies_are_undone(self) -> None:
        copy = RollbackCopy.allocate(self.partition.rollback_bytes())
        before = self.everything()
        self.partition.capture(copy)
        self.partition.scale_momentum(0.5)
        for then, now in zip(before[1], optimizer_state_of(self.engine), strict=True):
            halved = {**then, "exp_avg": then["exp_avg"] * 0.5} if then else then
            self.require(same_bits(halved, now), "scaled moments are not the first ones times the factor")
        self.partition.reset_moments()
        for now in optimizer_state_of(self.engine):
            left = {key for key, value in now.items() if torch.as_tensor(value).any()}
            self.require(not left, f"{left} are not reset")
        self.partition.restore(copy)
        self.require_equal_state(before)
        rates = of_all_ranks(self.partition.learning_rates())
        self.require(all(each == (1e-2,) * self.case.groups for each in rates), f"learning rates are {rates}")

    def remapped_after_load_checkpoint(self) -> None:
        self.engine.save_checkpoint(str(self.folder / "resume"))
        saved = self.snapshot()
        train(self.engine, range(9, 10))
        self.engine.load_checkpoint(str(self.folder / "resume"))
        self.partition.map_anew()
        self.require(same_bits(self.snapshot(), saved), "the partition mapped after load_checkpoint reads other values")
        self.written_values_read_back()

    def offloaded_states_are_refused_until_reloaded(self) -> None:
        offloadable = self.case.stage > 0 and hasattr(self.engine.optimizer, "offload_states")
        if not offloadable or "offload_optimizer" in self.case.zero:
            return
        before = self.snapshot()
        fragile = self.mapped_once()
        if self.case.stage == 3:
            # DeepSpeed does it for its fused optimizer only, which needs a GPU: no more than its mark is set.
            self.engine.optimizer.offloaded_states.add(OffloadStateTypeEnum.lp_params)
        else:
            self.engine.offload_states(pin_memory=False)
        self.require_stale(fragile, "the optimizer's states are away")
        try:
            self.partition.require_current()
        except StalePartitionError as error:
            self.require("engine.reload_states()" in str(error), f"{error} does not say what helps")
        else:
            self.require(False, "a partition is current although the optimizer's states are away")
        if self.case.stage == 3:
            self.engine.optimizer.offloaded_states.clear()
        else:
            self.engine.reload_states()
        self.require(same_bits(self.snapshot(), before), "the partition reads other values after reload_states")
        self.written_values_read_back()

    def stale_partition_raises(self) -> None:
        """Last, because it leaves the optimizer with tensors that nothing updates."""
        optimizer = self.engine.optimizer
        parameter = next(parameter for parameter in self.engine.module.parameters() if parameter.requires_grad)
        if hasattr(optimizer, "bit16_groups_flat") or hasattr(optimizer, "bf16_groups_flat"):
            fragile = self.mapped_once()
            kept, parameter.data = parameter.data, parameter.data.clone()
            self.require_stale(fragile, "a parameter left its flat tensor")
            parameter.data = kept
            fragile.require_current()
            self.read()
        masters = (
            next((getattr(optimizer, name) for name in MASTER_LISTS if hasattr(optimizer, name)), None)
            or optimizer.param_groups[0]["params"]
        )
        if isinstance(masters[0], list):
            masters = masters[0]
        expected = self.snapshot()
        fragile = self.mapped_once()
        masters[0] = nn.Parameter(masters[0].detach().clone())
        self.require_stale(fragile, "a master was replaced")
        if masters[0].shape == parameter.shape and self.case.stage == 0:
            # Where masters are the parameters themselves, a replaced one is no longer the model's.
            return
        masters[0].data.add_(1.0)
        changed = sum(not same_bits(now, then) for now, then in zip(self.snapshot(), expected, strict=True))
        self.require(changed > 0, "the partition that maps itself anew reads the tensors of before")

    def require_stale(self, partition: Partition, why: str) -> None:
        out = torch.empty(total_elements(partition.upload_shards))
        delta = torch.zeros(total_elements(partition.owned_shards))
        copy = RollbackCopy.allocate(0)
        uses: tuple[Callable[[], None], ...] = (
            lambda: partition.read(out),
            lambda: partition.read_owned(delta),
            lambda: partition.apply(delta, 1.0),
            lambda: partition.capture(copy),
            lambda: partition.restore(copy),
            lambda: partition.require_restorable(copy),
            partition.require_current,
        )
        for use in uses:
            try:
                use()
            except StalePartitionError:
                continue
            raise AssertionError(f"{why}, but the partition was used all the same")


CHECKS = (
    CaseRun.rollback_before_first_step,
    CaseRun.coverage,
    CaseRun.snapshot_equals_reference,
    CaseRun.written_values_read_back,
    CaseRun.applied_delta_is_published,
    CaseRun.training_goes_on_equally,
    CaseRun.rollback_is_bit_identical,
    CaseRun.moments_policies_are_undone,
    CaseRun.remapped_after_load_checkpoint,
    CaseRun.offloaded_states_are_refused_until_reloaded,
    CaseRun.stale_partition_raises,
)
