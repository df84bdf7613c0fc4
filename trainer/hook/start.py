"""What comes before the first step: ranks agree on settings and model, couriers start, the service is asked."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sidecast.errors import ConfigError, SidecastError
from sidecast.manifest import ModelManifest
from sidecast.policies.push import CONTEXT_LEN, PushConfig
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.hook.attachment import Attachment, new_session
from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.hook.config import NowcasterConfig, parse_section
from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.hook.jump import require_learning_rates
from sidecast.trainer.hook.memory_budget import rank_memory, require_room
from sidecast.trainer.hook.ranks import Ranks
from sidecast.trainer.hook.replay import Replayer
from sidecast.trainer.hook.replicas import require_equal_replicas
from sidecast.trainer.hook.reporting import log_event
from sidecast.trainer.hook.rollback_memory import reserve_rollback_copy
from sidecast.trainer.hook.run_file import RunFile
from sidecast.trainer.hook.training_run import TrainingRun
from sidecast.trainer.partitions import Partition
from sidecast.trainer.pipe.messages import (
    ClientSettings,
    Connected,
    CourierSettings,
    Disconnected,
    HorizonSettings,
    Opening,
    PushSettings,
    Refused,
    Session,
    Shard,
)

# What a service shows of a run with pushes in place of a predictor.
PUSH_PREDICTOR = "push"


def is_disabled(section: Any) -> bool:
    """Whether unchecked settings say that nothing is to be touched."""
    return isinstance(section, Mapping) and section.get("enabled") is False


def start(section: Any, run: TrainingRun) -> Attachment:
    """Puts the hook on a training run, which must not have made a step since its weights were last loaded; collective.

    Args:
        section: The ``"nowcaster"`` settings, unchecked; they are enabled.
        run: To put it on.

    Returns:
        The hook on the run; the caller calls it at every step boundary.

    Raises:
        ConfigError: The settings or the model are not ones that can be nowcasted, the service refuses the run, or
            there is no service although ``require`` is set. All ranks raise together.
    """
    ranks = Ranks.of_world()
    try:
        return _start_with(section, run, ranks)
    except SidecastError:
        ranks.close()
        raise


def _start_with(section: Any, run: TrainingRun, ranks: Ranks) -> Attachment:
    config, partition, manifest = _agree(section, run, ranks)
    step = run.applied_steps()
    if config.replay_dir is not None:
        with ranks.refused_together():
            replayer = Replayer(Path(config.replay_dir), partition, rank=ranks.rank, step=step, on_close=ranks.close)
        if ranks.rank == 0:
            replayer.add_listener(log_event)
        return Attachment(run, replayer, partition, ranks)
    require_room(ranks.gather(rank_memory(config, partition)), config.max_host_memory_gib)
    session = new_session(ranks, step)
    with contextlib.ExitStack() as undo:
        with ranks.refused_together():
            run_file = RunFile(config.run_file, config.endpoint) if config.run_file and ranks.rank == 0 else None
            rollback_copy = reserve_rollback_copy(config, partition)
            courier = _start_courier(config, run, partition, manifest, session, ranks)
            # What another rank refuses ends this one's courier, too.
            undo.callback(courier.close)
        undo.pop_all()
    is_linked = _await_link(config, courier, ranks)
    if run_file is not None:
        # Not before the service has taken the run: what is there is perhaps the key to one that goes on.
        run_file.renew(session)
    hook = NowcastHook(
        config,
        partition,
        courier,
        ranks.votes(),
        step=step,
        run_id=session.run_id,
        rollback_copy=rollback_copy,
        is_linked=is_linked,
    )
    if ranks.rank == 0:
        hook.add_listener(log_event)
    # What is dropped without having been closed; at the process's end the courier finds out by itself.
    weakref.finalize(hook, _end, courier, ranks).atexit = False
    return Attachment(run, hook, partition, ranks, courier, run_file)


def _end(courier: CourierHandle, ranks: Ranks) -> None:
    courier.close()
    ranks.close()


def _agree(section: Any, run: TrainingRun, ranks: Ranks) -> tuple[NowcasterConfig, Partition, ModelManifest]:
    """Reads settings and model; if any rank cannot, or ranks differ, all raise."""
    with ranks.refused_together():
        config = parse_section(section)
        partition = Partition(run.map_layout)
        require_learning_rates(config, partition)
        manifest = ModelManifest(partition.parameters, run.model_config, partition.aliases)
    fingerprints = ranks.gather(json.dumps(asdict(config), sort_keys=True) + manifest.schema_hash)
    for rank, fingerprint in enumerate(fingerprints):
        if fingerprint != fingerprints[0]:
            raise ConfigError(f"rank {rank} has other nowcaster settings, or another model, than rank 0")
    require_equal_replicas(partition, ranks)
    return config, partition, manifest


def _start_courier(
    config: NowcasterConfig,
    run: TrainingRun,
    partition: Partition,
    manifest: ModelManifest,
    session: Session,
    ranks: Ranks,
) -> CourierHandle:
    metrics_port = config.metrics_port
    if metrics_port:
        metrics_port += run.local_rank
    settings = CourierSettings(
        rank=ranks.rank,
        run_name=config.run_name,
        stage=run.stage,
        client=_client_settings(config),
        wire_dtype=config.wire_dtype,
        shared_memory=config.shared_memory,
        metrics_port=metrics_port,
        record_dir=_absolute(config.record_dir),
        upload_shards=_plain(partition.upload_shards),
        fetch_shards=_plain(partition.owned_shards),
        opening=_opening(config, manifest, ranks.world_size) if ranks.rank == 0 else None,
    )
    courier = CourierHandle(settings, session, config.num_slots)
    courier.start()
    return courier


def _client_settings(config: NowcasterConfig) -> ClientSettings:
    return ClientSettings(
        endpoint=config.endpoint,
        token_file=_absolute(config.token_file),
        tls_ca=_absolute(config.tls_ca),
        tls_cert=_absolute(config.tls_cert),
        tls_key=_absolute(config.tls_key),
        connect_s=config.timeouts.connect_s,
        chunk_s=config.timeouts.chunk_s,
        stream_s=config.timeouts.stream_s,
        channels=config.channels,
        max_bytes_per_s=None if config.max_mbytes_per_s is None else config.max_mbytes_per_s * 1e6,
    )


def _absolute(path: str | None) -> str | None:
    # A courier that is started later, in place of one that died, may find itself in another working directory.
    return None if path is None else os.path.abspath(path)


def _opening(config: NowcasterConfig, manifest: ModelManifest, world_size: int) -> Opening:
    return Opening(
        world_size=world_size,
        schema_hash=manifest.schema_hash,
        context_len=config.context_len if config.policy == "jump" else CONTEXT_LEN,
        snapshot_interval_steps=config.interval_steps,
        period_steps=config.nowcast_interval_steps,
        max_steps=config.max_steps or 0,
        horizon=HorizonSettings(
            schedule=config.horizon.schedule or "",
            max_intervals=config.horizon.max or 0,
            power=config.horizon.power,
        ),
        predictor=config.predictor if config.policy == "jump" else PUSH_PREDICTOR,
        predictor_options_json=json.dumps(dict(config.predictor_options)),
        max_relative_norm=config.max_relative_norm,
        aliases=dict(manifest.aliases),
        parameters=tuple((spec.fqn, tuple(spec.shape)) for spec in manifest.parameters),
        config_json=json.dumps(dict(manifest.config)),
        push=None if config.policy == "jump" else _push_settings(config.push),
        read_outs=config.read_outs,
        keep_best=config.keep_best,
    )


def _push_settings(push: PushConfig) -> PushSettings:
    return PushSettings(
        time_constant_steps=push.time_constant_steps,
        gain=push.gain,
        start_step=push.start_step,
        stop_step=push.stop_step,
        max_relative_norm=push.max_relative_norm,
    )


def _plain(shards: tuple[ShardSpec, ...]) -> tuple[Shard, ...]:
    return tuple((shard.parameter, shard.start, shard.stop) for shard in shards)


def _await_link(config: NowcasterConfig, courier: CourierHandle, ranks: Ranks) -> bool:
    """Learns whether the service is there and willing, before any training step; says so of this rank's courier."""
    # Others can only join what rank 0 has opened: they ask once it knows.
    answer: Connected | Refused | Disconnected = ranks.from_first(
        _first_answer(courier, config) if ranks.rank == 0 else None
    )
    if ranks.rank != 0 and isinstance(answer, Connected):
        answer = _first_answer(courier, config)
    answers = ranks.gather(answer)
    refusals = [item.reason for item in answers if isinstance(item, Refused)]
    absences = [item.reason for item in answers if isinstance(item, Disconnected)]
    if refusals or (absences and config.require):
        courier.close()
        if refusals:
            raise ConfigError(f"the nowcaster service at {config.endpoint} refuses this run: {refusals[0]}")
        raise ConfigError(
            f"nowcaster.require is true, but {absences[0]}; start one with `sidecast serve`, or set it to false"
        )
    if absences and ranks.rank == 0:
        warnings.warn(f"{absences[0]}: training goes on without nowcasts, and with them once it is there", stacklevel=4)
    return isinstance(answer, Connected)


def _first_answer(courier: CourierHandle, config: NowcasterConfig) -> Connected | Refused | Disconnected:
    deadline_s = time.monotonic() + config.timeouts.connect_s + config.timeouts.stream_s
    while (left_s := deadline_s - time.monotonic()) > 0:
        for message in courier.receive(left_s):
            if isinstance(message, Connected | Refused | Disconnected):
                return message
        if not courier.is_alive:
            return Disconnected(reason="the nowcaster's courier process does not stay alive")
    return Disconnected(reason=f"the nowcaster service at {config.endpoint} did not answer in time")
