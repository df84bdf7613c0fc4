"""Runs every case of one world size in one process group and writes down what it found; one process per rank."""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from deepspeed.utils import safe_get_full_fp32_param
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import sidecast
from sidecast.protos.shards import ShardSpec, coverage_error, total_elements
from sidecast.trainer.integrations.deepspeed import nowcaster_of
from sidecast.trainer.partitions import (
    Partition,
    RemappingPartition,
    RollbackCopy,
    StalePartitionError,
    partition_of,
)
from tests.integration.workers.partition_cases import ATTACHED_CASES, ATTACHED_WORLD_SIZE, CASES_OF_WORLD_SIZE, Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# With these and the sizes below, neither two nor three ranks divide a parameter or a group of them evenly.
VOCABULARY = 30


class ScalarModel(nn.Module):
    """Three trained elements: with three ranks, some hold nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.5))
        self.shift = nn.Parameter(torch.full((2,), 0.25))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = input_ids.to(self.scale.dtype) / VOCABULARY
        predicted = x * self.scale + self.shift.sum()
        return {"loss": (predicted - labels / VOCABULARY).pow(2).mean()}


def build_model(case: Case) -> nn.Module:
    torch.manual_seed(7)
    if case.model == "scalar":
        return ScalarModel()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=13,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    if case.frozen:
        model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
        model.model.norm.weight.requires_grad_(False)
    return model


def build_engine(case: Case, nowcaster: dict[str, Any] | None = None) -> Any:
    model = build_model(case)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if case.groups == 2:
        groups = [
            {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": 0.1},
            {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": parameters, "weight_decay": 0.1}]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.stage, **case.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.settings,
    }
    if nowcaster is not None:
        config["nowcaster"] = nowcaster
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True, **config.get("bf16", {})}
    if case.dtype == "fp16":
        # Small enough not to overflow, and growing within the few steps of a case.
        config["fp16"] = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}
    with fused_optimizer(case.fused):
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    return engine


@contextmanager
def fused_optimizer(fused: bool) -> Iterator[None]:
    """Makes DeepSpeed take AdamW for its fused optimizer, which needs a GPU or a compiler."""
    if not fused:
        yield
        return
    import deepspeed.runtime.engine as engine_module

    original = engine_module.FusedAdam
    engine_module.FusedAdam = torch.optim.AdamW
    try:
        yield
    finally:
        engine_module.FusedAdam = original


def train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        tokens = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
        loss = engine(input_ids=tokens, labels=tokens)["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


# What follows looks into DeepSpeed independently of the code under test.


MASTER_LISTS = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
    "fp32_groups_flat",
    "fp32_groups",
)


def masters_of(engine: Any) -> list[Tensor]:
    optimizer = engine.optimizer
    for name in MASTER_LISTS:
        if hasattr(optimizer, name):
            found = getattr(optimizer, name)
            return list(chain.from_iterable(found)) if name == "fp32_groups" else list(found)
    return [parameter for parameter in engine.module.parameters() if parameter.requires_grad]


def optimizer_state_of(engine: Any) -> list[dict[str, Any]]:
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return [copy.deepcopy(dict(inner.state.get(master, {}))) for master in masters_of(engine)]


def module_weights(engine: Any) -> dict[str, Tensor]:
    """Full low-precision weights of the model as this rank sees them."""
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        return {
            name: parameter.detach().clone()
            for name, parameter in engine.module.named_parameters(remove_duplicate=False)
        }


def reference_snapshot(engine: Any, case: Case, folder: Path) -> dict[str, Tensor]:
    """The full-precision weights by DeepSpeed's own account."""
    trained = {name for name, p in engine.module.named_parameters(remove_duplicate=False) if p.requires_grad}
    if hasattr(engine.optimizer, "bf16_groups"):
        # zero_to_fp32 does not read the checkpoints of BF16_Optimizer.
        named = engine.module.named_parameters(remove_duplicate=False)
        reference = {name: safe_get_full_fp32_param(parameter) for name, parameter in named if name in trained}
    elif case.stage > 0:
        engine.save_checkpoint(str(folder))
        dist.barrier()
        reference = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    elif case.dtype == "fp32":
        reference = module_weights(engine)
    else:
        names = {id(p): name for name, p in engine.module.named_parameters()}
        lows = list(chain.from_iterable(engine.optimizer.fp16_groups))
        highs = chain.from_iterable(
            torch._utils._unflatten_dense_tensors(flat, group) if case.fused else flat
            for flat, group in zip(
                engine.optimizer.fp32_groups_flat if case.fused else engine.optimizer.fp32_groups,
                engine.optimizer.fp16_groups,
                strict=True,
            )
        )
        by_name = {names[id(low)]: high.detach() for low, high in zip(lows, highs, strict=True)}
        aliases = {name: names[id(p)] for name, p in engine.module.named_parameters(remove_duplicate=False)}
        reference = {name: by_name[first] for name, first in aliases.items() if first in by_name}
    return {name: tensor.float() for name, tensor in reference.items() if name in trained}


def same_bits(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return torch.equal(left.contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same_bits(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(same_bits, left, right))
    return bool(left == right)


def digest(tensors: dict[str, Tensor]) -> str:
    state = hashlib.blake2b()
    for name in sorted(tensors):
        state.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def of_all_ranks(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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
        self.partition: Partition = partition_of(self.engine)
        self.partition.require_current()
        self.numels = [spec.numel for spec in self.partition.parameters]
        self.dtype = DTYPES[case.dtype]

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
        self.partition.write(self.cut(self.snapshot(), self.partition.owned_shards))
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
        self.partition.write(self.cut(target, self.partition.owned_shards))
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
        self.require(same_bits(self.snapshot(), added), "mode 'add' did not give now + weight * delta")
        self.require_model_equals(added)
        base = self.cut(before, self.partition.owned_shards)
        self.partition.apply(local, 0.5, mode="replace", base=base)
        replaced = [
            (step * 0.5 + then).to(self.master_dtype()).float() for then, step in zip(before, delta, strict=True)
        ]
        self.require(same_bits(self.snapshot(), replaced), "mode 'replace' did not give base + weight * delta")
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
        self.partition = partition_of(self.engine)
        self.require(same_bits(self.snapshot(), saved), "the partition made after load_checkpoint reads other values")
        self.written_values_read_back()

    def offloaded_states_are_refused_until_reloaded(self) -> None:
        offloadable = self.case.stage > 0 and hasattr(self.engine.optimizer, "offload_states")
        if not offloadable or "offload_optimizer" in self.case.zero:
            return
        before = self.snapshot()
        partition = RemappingPartition(lambda: partition_of(self.engine))
        if self.case.stage == 3:
            # DeepSpeed does it for its fused optimizer only, which needs a GPU: no more than its mark is set.
            self.engine.optimizer.offloaded_states.add(OffloadStateTypeEnum.lp_params)
        else:
            self.engine.offload_states(pin_memory=False)
        for fragile in (self.partition, partition):
            try:
                fragile.require_current()
            except StalePartitionError as error:
                self.require("engine.reload_states()" in str(error), f"{error} does not say what helps")
            else:
                self.require(False, "a partition is current although the optimizer's states are away")
        if self.case.stage == 3:
            self.engine.optimizer.offloaded_states.clear()
        else:
            self.engine.reload_states()
        self.partition = partition
        self.require(same_bits(self.snapshot(), before), "the partition reads other values after reload_states")
        self.written_values_read_back()
        self.partition = partition_of(self.engine)

    def stale_partition_raises(self) -> None:
        """Last, because it leaves the optimizer with tensors that nothing updates."""
        optimizer = self.engine.optimizer
        parameter = next(parameter for parameter in self.engine.module.parameters() if parameter.requires_grad)
        if hasattr(optimizer, "bit16_groups_flat") or hasattr(optimizer, "bf16_groups_flat"):
            kept, parameter.data = parameter.data, parameter.data.clone()
            self.require_stale("a parameter left its flat tensor")
            parameter.data = kept
            self.read()
        masters = (
            next((getattr(optimizer, name) for name in MASTER_LISTS if hasattr(optimizer, name)), None)
            or optimizer.param_groups[0]["params"]
        )
        if isinstance(masters[0], list):
            masters = masters[0]
        expected = self.snapshot()
        remapping = RemappingPartition(lambda: partition_of(self.engine))
        masters[0] = nn.Parameter(masters[0].detach().clone())
        self.require_stale("a master was replaced")
        if masters[0].shape == parameter.shape and self.case.stage == 0:
            # Where masters are the parameters themselves, a replaced one is no longer the model's.
            return
        self.partition = remapping
        masters[0].data.add_(1.0)
        changed = sum(not same_bits(now, then) for now, then in zip(self.snapshot(), expected, strict=True))
        self.require(changed > 0, "the partition that maps itself anew reads the tensors of before")

    def require_stale(self, why: str) -> None:
        out = torch.empty(total_elements(self.partition.upload_shards))
        delta = torch.zeros(total_elements(self.partition.owned_shards))
        copy = RollbackCopy.allocate(0)
        uses: tuple[Callable[[], None], ...] = (
            lambda: self.partition.read(out),
            lambda: self.partition.apply(delta, 1.0),
            lambda: self.partition.write(delta),
            lambda: self.partition.capture(copy),
            lambda: self.partition.restore(copy),
            lambda: self.partition.require_restorable(copy),
            self.partition.require_current,
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


def run_case(case: Case, folder: Path) -> dict[str, str | None]:
    """Runs the checks of one case; the first failure ends it, as later checks build on earlier ones."""
    found: dict[str, str | None] = {}
    run = CaseRun(case, folder)
    for check in CHECKS:
        try:
            check(run)
            failure = None
        except AssertionError as error:
            failure = str(error)
        failures = [each for each in of_all_ranks(failure) if each is not None]
        found[check.__name__] = failures[0] if failures else None
        if failures:
            break
    run.engine.destroy()
    return found


def trained(case: Case, nowcaster: dict[str, Any] | None) -> tuple[list[Any], int]:
    """Everything that eight steps leave on this rank, and how many snapshots were staged on the way."""
    engine = sidecast.attach(build_engine(case, nowcaster))
    losses = train(engine, range(8))
    hook = nowcaster_of(engine)
    num_staged = 0
    if hook is not None:
        num_staged = hook.summary()["num_staged"]
        hook.close()
    # Not the masters as they lie in memory: DeepSpeed never sets the padding among them, with or without a hook.
    partition = partition_of(engine)
    owned = torch.empty(total_elements(partition.owned_shards))
    partition.read_owned(owned)
    state = [losses, owned, optimizer_state_of(engine), module_weights(engine)]
    engine.destroy()
    return state, num_staged


def run_attached(case: Case) -> str | None:
    """What a hook that applies nothing changes; None if nothing."""
    # Nobody listens there: what training could notice is the reading and voting on this side.
    section = {"context_len": 2, "period_steps": 6, "endpoint": "127.0.0.1:1", "timeouts": {"connect_s": 0.05}}
    with_hook, num_staged = trained(case, section)
    without, _ = trained(case, None)
    failure = None if same_bits(with_hook, without) else "losses, masters, moments or weights differ"
    if num_staged == 0:
        failure = "nothing was staged, the check is void"
    return next((each for each in of_all_ranks(failure) if each is not None), None)


def main(scratch: Path, results: Path) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world_size)
    # The shared-memory operator only speeds reductions up, and takes a C++ compiler minutes to build.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    # DeepSpeed refuses fp16 on processors without its instructions; torch computes it there too, slowly.
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo")
    for name, case in CASES_OF_WORLD_SIZE[world_size].items():
        folder = scratch / name
        found = run_case(case, folder)
        if rank == 0:
            (results / f"{name}.json").write_text(json.dumps(found))
    for name, case in ATTACHED_CASES.items() if world_size == ATTACHED_WORLD_SIZE else ():
        failure = run_attached(case)
        if rank == 0:
            (results / f"attached-{name}.json").write_text(json.dumps({"attached": failure}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
