"""``sidecast.attach(engine)``: puts the hook around a DeepSpeed engine, in place."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import uuid
import warnings
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sidecast.errors import ConfigError, SidecastError
from sidecast.manifest import ModelManifest
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.nowcast.config import NowcasterConfig, parse_section
from sidecast.trainer.nowcast.courier_handle import CourierHandle
from sidecast.trainer.nowcast.hook import Nowcaster, dump_config, rollback_path
from sidecast.trainer.nowcast.partitions import Partition, RemappingPartition, partition_of
from sidecast.trainer.nowcast.partitions.engine_facts import applied_steps, nowcaster_section, zero_stage
from sidecast.trainer.nowcast.replay import Replayer
from sidecast.trainer.nowcast.vote import VoteBox

log = logging.getLogger(__name__)

FP32_BYTES = 4
CLIENT_STATE_KEY = "sidecast"

_hooks: weakref.WeakKeyDictionary[Any, Nowcaster | Replayer] = weakref.WeakKeyDictionary()


def nowcaster_of(engine: Any) -> Nowcaster | Replayer | None:
    """The hook that ``attach`` put around an engine; None if nowcasting is not enabled."""
    return _hooks.get(engine)


def attach(engine: Any) -> Any:
    """Lets a DeepSpeed engine be nowcasted, as its ds_config's top-level ``"nowcaster"`` section says.

    Call it once on every rank, right after ``deepspeed.initialize`` and before ``engine.load_checkpoint``. It
    wraps the engine's ``step``, ``backward``, ``save_checkpoint`` and ``load_checkpoint`` in place. Without that
    section, or with ``"enabled": false``, nothing is touched.

    Args:
        engine: What ``deepspeed.initialize`` returned.

    Returns:
        The same engine.

    Raises:
        ConfigError: The section, the engine or the model is not one that can be nowcasted, the service refuses
            it, or there is no service although ``require`` is set. All ranks raise together.
    """
    section = nowcaster_section(engine)
    if section is None or (isinstance(section, Mapping) and section.get("enabled") is False):
        return engine
    if _hooks.get(engine) is not None:
        raise ConfigError("sidecast.attach was called twice on this engine; once is enough")
    if not dist.is_initialized():
        raise ConfigError("sidecast.attach needs torch.distributed; call deepspeed.initialize first")
    group = dist.new_group(backend="gloo")
    config, partition, manifest = _agree(engine, section, group)
    step = applied_steps(engine)
    if config.replay_dir is not None:
        with refused_together(group):
            replayer = Replayer(Path(config.replay_dir), partition, rank=dist.get_rank(), step=step)
        _hooks[engine] = replayer
        _wrap_step(engine, replayer)
        _wrap_load_for_replay(engine, replayer)
        return engine
    session = _new_session(group, step)
    with refused_together(group):
        courier = _start_courier(engine, config, partition, manifest, session)
    _await_link(config, courier, group)
    hook = Nowcaster(config, partition, courier, VoteBox(group), step=step, run_id=session["run_id"])
    _hooks[engine] = hook
    _wrap_step(engine, hook)
    _wrap_backward(engine, hook)
    _wrap_save(engine, hook)
    _wrap_load(engine, hook, courier, group)
    return engine


# --- before the first step


@contextlib.contextmanager
def refused_together(group: dist.ProcessGroup) -> Iterator[None]:
    """What one rank refuses inside the block, all ranks raise; the others would wait for it in the next collective."""
    error = ""
    try:
        yield
    except SidecastError as refusal:
        error = str(refusal)
    except OSError as failure:
        error = f"rank {dist.get_rank(group)} cannot start its courier: {failure}"
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, error, group=group)
    for other_error in said:
        if other_error:
            raise ConfigError(other_error)


def _agree(engine: Any, section: Any, group: dist.ProcessGroup) -> tuple[NowcasterConfig, Partition, ModelManifest]:
    """Reads settings and model; if any rank cannot, or ranks differ, all raise."""
    with refused_together(group):
        config = parse_section(section)
        partition = RemappingPartition(lambda: partition_of(engine))
        manifest = ModelManifest(partition.parameters, _model_config(engine), partition.aliases)
    fingerprints: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(fingerprints, dump_config(config) + manifest.schema_hash, group=group)
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise ConfigError(f"rank {rank} has other nowcaster settings, or another model, than rank 0")
    return config, partition, manifest


def _model_config(engine: Any) -> dict[str, Any]:
    to_json_string = getattr(getattr(engine.module, "config", None), "to_json_string", None)
    return {} if to_json_string is None else dict(json.loads(to_json_string(use_diff=False)))


def _new_session(group: dist.ProcessGroup, step: int, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """A session of a new run, or of the run that a loaded checkpoint belongs to; the same on all ranks."""
    fresh = [uuid.uuid4().hex[:16], uuid.uuid4().hex[:16]]
    dist.broadcast_object_list(fresh, src=0, group=group)
    return {
        "session_id": fresh[0],
        "run_id": fresh[1] if state is None else state["run_id"],
        "resumed": state is not None,
        "resume_step": step,
        "resume_epoch": 0 if state is None else state["epoch"],
    }


def _start_courier(
    engine: Any, config: NowcasterConfig, partition: Partition, manifest: ModelManifest, session: dict[str, Any]
) -> CourierHandle:
    rank = dist.get_rank()
    metrics_port = config.metrics_port
    if metrics_port:
        metrics_port += int(engine.local_rank)
    opening = {
        "fields": {
            "world_size": dist.get_world_size(),
            "schema_hash": manifest.schema_hash,
            "context_len": config.context_len,
            "snapshot_interval_steps": config.interval_steps,
            "period_steps": config.period_steps,
            "max_steps": config.max_steps or 0,
            "horizon": {
                "schedule": config.horizon.schedule or "",
                "max_intervals": config.horizon.max or 0,
                "power": config.horizon.power,
            },
            "predictor": config.predictor,
            "predictor_options_json": json.dumps(dict(config.predictor_options)),
            "max_relative_norm": config.max_relative_norm,
            "aliases": dict(manifest.aliases),
        },
        "parameters": [[spec.fqn, list(spec.shape)] for spec in manifest.parameters],
        "config_json": json.dumps(dict(manifest.config)),
    }
    hello = {
        "rank": rank,
        "stage": zero_stage(engine),
        "run_name": config.run_name,
        "client": {
            "endpoint": config.endpoint,
            "token_file": config.token_file,
            "tls_ca": config.tls_ca,
            "connect_s": config.timeouts.connect_s,
            "chunk_s": config.timeouts.chunk_s,
            "stream_s": config.timeouts.stream_s,
        },
        "metrics_port": metrics_port,
        "record_dir": config.record_dir,
        "session": session,
        "opening": opening if rank == 0 else None,
        "upload_shards": _plain(partition.upload_shards),
        "fetch_shards": _plain(partition.owned_shards),
    }
    courier = CourierHandle(
        hello,
        upload_bytes=FP32_BYTES * sum(shard.numel for shard in partition.upload_shards),
        fetch_bytes=FP32_BYTES * sum(shard.numel for shard in partition.owned_shards),
    )
    courier.start()
    return courier


def _plain(shards: tuple[ShardSpec, ...]) -> list[list[int]]:
    return [[shard.parameter, shard.start, shard.stop] for shard in shards]


def _await_link(config: NowcasterConfig, courier: CourierHandle, group: dist.ProcessGroup) -> None:
    """Learns whether the service is there and willing, before any training step."""
    said: list[Any] = [None] * dist.get_world_size(group)
    rank = dist.get_rank(group)
    # Others can only join what rank 0 has opened: they ask once it knows.
    first: list[Any] = [_first_word(courier, config) if rank == 0 else None]
    dist.broadcast_object_list(first, src=0, group=group)
    word: tuple[str, str] = first[0]
    if rank != 0 and word[0] == "connected":
        word = _first_word(courier, config)
    dist.all_gather_object(said, word, group=group)
    refusals = [reason for kind, reason in said if kind == "refused"]
    absences = [reason for kind, reason in said if kind == "disconnected"]
    if refusals or (absences and config.require):
        courier.close()
        if refusals:
            raise ConfigError(f"the nowcaster service at {config.endpoint} refuses this run: {refusals[0]}")
        raise ConfigError(
            f"nowcaster.require is true, but {absences[0]}; start one with `sidecast serve`, or set it to false"
        )
    if absences and rank == 0:
        warnings.warn(f"{absences[0]}: training goes on without nowcasts, and with them once it is there", stacklevel=3)


def _first_word(courier: CourierHandle, config: NowcasterConfig) -> tuple[str, str]:
    deadline_s = time.monotonic() + config.timeouts.connect_s + config.timeouts.stream_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        for message in courier.receive(left_s):
            if message["type"] in ("connected", "refused", "disconnected"):
                return message["type"], message.get("reason", "")
        if not courier.is_alive:
            return "disconnected", "the nowcaster's courier process does not stay alive"
    return "disconnected", f"the nowcaster service at {config.endpoint} did not answer in time"


# --- around the engine's methods


def _wrap_step(engine: Any, hook: Nowcaster | Replayer) -> None:
    original = engine.step

    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if engine.was_step_applied():
            hook.after_step(applied_steps(engine))
        return result

    engine.step = step


def _wrap_backward(engine: Any, hook: Nowcaster) -> None:
    original = engine.backward

    def backward(loss: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_tensor(loss):
            hook.observe(loss)
        return original(loss, *args, **kwargs)

    engine.backward = backward


def _wrap_save(engine: Any, hook: Nowcaster) -> None:
    original = engine.save_checkpoint

    def save_checkpoint(
        save_dir: Any, tag: Any = None, client_state: dict[str, Any] | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        tag = f"global_step{engine.global_steps}" if tag is None else tag
        state = {**(client_state or {}), CLIENT_STATE_KEY: hook.state_dict()}
        result = original(save_dir, tag, state, *args, **kwargs)
        if hook.is_on_probation and hook.rollback_copy is not None:
            path = rollback_path(Path(save_dir) / str(tag), dist.get_rank())
            partial = path.with_suffix(".partial")
            torch.save(hook.rollback_copy.state_dict(), partial)
            os.replace(partial, path)
        return result

    engine.save_checkpoint = save_checkpoint


def _wrap_load(engine: Any, hook: Nowcaster, courier: CourierHandle, group: dist.ProcessGroup) -> None:
    original = engine.load_checkpoint
    shards = hook.shards

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, client_state = original(*args, **kwargs)
        if path is None:
            return path, client_state
        state = (client_state or {}).pop(CLIENT_STATE_KEY, None)
        partition = RemappingPartition(lambda: partition_of(engine))
        if (partition.upload_shards, partition.owned_shards) != shards:
            raise ConfigError("the loaded checkpoint changed this rank's partition; attach after loading it instead")
        step = applied_steps(engine)
        if state is not None and state["step"] != step:
            # Only weights were loaded: this is another run, whose optimizer the other's rollback copy must not reach.
            state = None
        session = _new_session(group, step, state)
        hook.resume(state, partition, step, session["run_id"])
        load_rollback_copy(hook, Path(path).parent, group)
        courier.new_session(session)
        return path, client_state

    engine.load_checkpoint = load_checkpoint


def load_rollback_copy(hook: Nowcaster, checkpoint: Path, group: dist.ProcessGroup) -> None:
    """A jump on probation can only stay so if every rank can still undo it."""
    if not hook.is_on_probation:
        return
    reason = ""
    try:
        hook.load_rollback_copy(torch.load(rollback_path(checkpoint, dist.get_rank()), weights_only=True))
    except (OSError, RuntimeError, SidecastError) as error:
        reason = str(error)
    reasons: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reasons, reason, group=group)
    for rank, reason in enumerate(reasons):
        if reason:
            log.warning("rank %d has no rollback copy, the jump on probation cannot be undone: %s", rank, reason)
            hook.end_probation()
            return


def _wrap_load_for_replay(engine: Any, replayer: Replayer) -> None:
    original = engine.load_checkpoint

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        path, client_state = original(*args, **kwargs)
        if path is not None:
            (client_state or {}).pop(CLIENT_STATE_KEY, None)
            replayer.resume(RemappingPartition(lambda: partition_of(engine)), applied_steps(engine))
        return path, client_state

    engine.load_checkpoint = load_checkpoint
