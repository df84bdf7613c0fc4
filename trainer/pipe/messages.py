"""Every message between a training rank and its courier, in either direction.

``ToCourier`` and ``ToHook`` are closed: whoever receives matches all of them. ``encoding.py`` puts them into bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Shard = tuple[int, int, int]
"""A contiguous range of one parameter: its index in the manifest, start and stop in elements."""

Outcome = Literal["applied", "accepted", "rolled_back", "rejected"]


@dataclass(frozen=True, kw_only=True)
class Session:
    """One attach of a run to the service.

    Attributes:
        session_id: Names the session; new at every attach and resume.
        run_id: Names the run; kept over resumes.
        resumed: Whether the run goes on from a checkpoint that knows it.
        resume_step: Optimizer steps applied when the session begins.
        resume_epoch: The run's epoch when the session begins.
        run_secret: What the service knows the run by; kept over resumes, and shown to nobody else.
    """

    session_id: str
    run_id: str
    resumed: bool
    resume_step: int
    resume_epoch: int
    run_secret: str = field(repr=False)


# --- what the courier is told


@dataclass(frozen=True, kw_only=True)
class ClientSettings:
    """How the courier reaches the service; times in seconds."""

    endpoint: str
    token_file: str | None
    tls_ca: str | None
    connect_s: float
    chunk_s: float
    stream_s: float
    tls_cert: str | None = None
    tls_key: str | None = None
    channels: int = 1
    max_bytes_per_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class HorizonSettings:
    """How far ahead nowcasts reach; an empty schedule and 0 intervals leave it to the predictor."""

    schedule: str
    max_intervals: int
    power: float


@dataclass(frozen=True, kw_only=True)
class PushSettings:
    """How a run is pushed; fields are named as in Push of the wire."""

    time_constant_steps: float
    gain: float
    start_step: int
    stop_step: int | None
    max_relative_norm: float | None


@dataclass(frozen=True, kw_only=True)
class Opening:
    """What rank 0 announces of the run besides its session; fields are named as in OpenRequest of the wire.

    Attributes:
        parameters: ``(fqn, shape)`` of every parameter, in manifest order.
        config_json: The model's configuration.
        push: For a run with pushes; None for jumps.
        read_outs: Averages of the run's states that the service keeps.
        can_pause: That votes heed what the service says of pauses.
        keep_best: So many of these it keeps besides, for their losses.
    """

    world_size: int
    schema_hash: str
    context_len: int
    snapshot_interval_steps: int
    period_steps: int
    max_steps: int
    horizon: HorizonSettings
    predictor: str
    predictor_options_json: str
    max_relative_norm: float
    aliases: Mapping[str, str]
    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    config_json: str
    push: PushSettings | None = None
    read_outs: tuple[str, ...] = ()
    can_pause: bool = True
    keep_best: int = 0


@dataclass(frozen=True, kw_only=True)
class CourierSettings:
    """What holds for a rank's couriers as long as the hook is attached.

    Attributes:
        rank: Global rank.
        run_name: Value of the ``run`` label of the rank's metrics.
        stage: Who holds the weights, for the metrics.
        client: How to reach the service.
        wire_dtype: Whether states and predictions travel whole, or as 16-bit changes.
        shared_memory: Whether a service on this host may map the rank's buffers.
        metrics_port: Where the rank's metrics are served; 0 for a free port, None for nowhere.
        record_dir: Folder of the apply log; None for no log.
        upload_shards: What this rank uploads.
        fetch_shards: What this rank applies.
        opening: Of rank 0; None for the others.
    """

    rank: int
    run_name: str
    stage: str
    client: ClientSettings
    wire_dtype: Literal["fp32", "bf16_delta"]
    shared_memory: Literal["auto", "off"]
    metrics_port: int | None
    record_dir: str | None
    upload_shards: tuple[Shard, ...]
    fetch_shards: tuple[Shard, ...]
    opening: Opening | None


@dataclass(frozen=True, kw_only=True)
class Hello:
    """A rank's first message to each of its couriers.

    Attributes:
        settings: The same for all of them.
        session: To be opened.
        slot_descriptors: Of the staging buffers, each as large as the upload shards in fp32.
        prediction_descriptor: Of the prediction buffer, as large as the fetch shards in fp32.
        prediction_is_held: Whether that buffer must not be written to until it is released.
    """

    settings: CourierSettings
    session: Session
    slot_descriptors: tuple[int, ...]
    prediction_descriptor: int
    prediction_is_held: bool


@dataclass(frozen=True, kw_only=True)
class BeginSession:
    """The run goes on under another session."""

    session: Session


@dataclass(frozen=True, kw_only=True)
class Applied:
    """A prediction that was applied, and with which factor."""

    version: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A staging slot holds a snapshot, and is the courier's until it says ``Sent``.

    Attributes:
        slot: Which one.
        step: Optimizer step.
        epoch: Of the state.
        learning_rate_sum: Of all steps so far, in a run with pushes.
        applied: What began the epoch, in a run with pushes; None for nothing.
    """

    slot: int
    step: int
    epoch: int
    learning_rate_sum: float = 0.0
    applied: Applied | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was done with a prediction, for the service."""

    outcome: Outcome
    version: int
    step: int
    epoch: int


@dataclass(frozen=True, kw_only=True)
class Release:
    """The prediction buffer may be written to again; the courier answers with ``Confirmed``.

    Attributes:
        record: Entry of the apply log, to which the courier adds the buffer's content; None if it was not applied.
    """

    record: Mapping[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class Log:
    """An entry of the apply log; the courier answers with ``Confirmed``."""

    record: Mapping[str, Any]


@dataclass(kw_only=True)
class Totals:
    """What a rank has counted since the hook was attached: seconds, bytes and numbers of things.

    Each is a field here, counted where it happens, and one line in the courier's metrics if it is to be a series.
    """

    blocked_s: float = 0.0
    staging_s: float = 0.0
    bytes_uploaded: int = 0
    bytes_fetched: int = 0
    num_staged: int = 0
    num_committed: int = 0
    num_dropped: int = 0
    num_applied: int = 0
    num_accepted: int = 0
    num_rolled_back: int = 0
    num_rejected: int = 0
    num_failed: int = 0
    num_skipped: int = 0
    num_losses: int = 0
    num_verdict_losses: int = 0


@dataclass(frozen=True, kw_only=True)
class Stats:
    """Brings the rank's metrics up to date.

    Attributes:
        totals: A copy of what has been counted.
        step: Optimizer steps applied.
        loss: Mean training loss between the last two votes, over all ranks; None if nobody saw any.
        suspended: Whether jumps are suspended.
        paused: Whether the ranks have agreed to apply nothing until the service says otherwise.
        train_s: Seconds since the hook was attached.
        num_courier_deaths: Couriers that had to be replaced.
    """

    totals: Totals
    step: int
    loss: float | None
    suspended: bool
    train_s: float
    num_courier_deaths: int
    paused: bool = False


# --- what the courier tells


@dataclass(frozen=True, kw_only=True)
class Connected:
    """The session is joined, and the service wants the run to apply nothing, or to go on."""

    session_id: str
    is_paused: bool = False


@dataclass(frozen=True, kw_only=True)
class PauseChanged:
    """The service wants the run to apply nothing, or to go on."""

    is_paused: bool


@dataclass(frozen=True, kw_only=True)
class Disconnected:
    """The service is away; the courier goes on trying."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Refused:
    """The service refuses the session, which ends a run that begins; a courier that goes on asks again, slowly."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Sent:
    """The courier is done with a slot.

    Attributes:
        slot: Free again.
        step: Of the snapshot.
        seconds: That it took.
        num_bytes: That travelled; 0 if the snapshot was not sent.
        reason: Why the snapshot is lost; empty if it is not, or if its loss has been told before.
    """

    slot: int
    step: int
    seconds: float
    num_bytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Committed:
    """The service has all ranks' parts of a snapshot."""

    step: int


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """The service has given up a snapshot."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A prediction lies whole in the buffer, which is the rank's until it says ``Release``.

    Attributes:
        session_id: Session that it was made in.
        version: Its number in the run.
        base_step: Optimizer step that it starts from.
        epoch: Epoch of its base.
        horizon_intervals: How far ahead it reaches, in snapshot intervals.
        digest: Names its content among ranks, 63 bits.
        relative_norm: Of the predicted change.
        nowcast_s: Seconds that it took to make.
        num_bytes: That travelled to this rank.
    """

    session_id: str
    version: int
    base_step: int
    epoch: int
    horizon_intervals: int
    digest: int
    relative_norm: float
    nowcast_s: float
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class Failed:
    """There will be no prediction from the base of this step."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class MetricsServed:
    """The rank's metrics are served on this port."""

    port: int


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """The oldest ``Release`` or ``Log`` that was not confirmed is done."""


ToCourier = Hello | BeginSession | Snapshot | Report | Release | Log | Stats
ToHook = (
    Connected
    | PauseChanged
    | Disconnected
    | Refused
    | Sent
    | Committed
    | Dropped
    | Prediction
    | Failed
    | MetricsServed
    | Confirmed
)

TO_COURIER: Mapping[str, type[ToCourier]] = {kind.__name__: kind for kind in get_args(ToCourier)}
TO_HOOK: Mapping[str, type[ToHook]] = {kind.__name__: kind for kind in get_args(ToHook)}
