from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ("without_sessions",)
    WITHOUT_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    without_sessions: bool
    def __init__(self, without_sessions: _Optional[bool] = ...) -> None: ...

class ReadOutStatus(_message.Message):
    __slots__ = ("name", "step", "begin_step", "num_snapshots", "probe_loss")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BEGIN_STEP_FIELD_NUMBER: _ClassVar[int]
    NUM_SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    PROBE_LOSS_FIELD_NUMBER: _ClassVar[int]
    name: str
    step: int
    begin_step: int
    num_snapshots: int
    probe_loss: float
    def __init__(self, name: _Optional[str] = ..., step: _Optional[int] = ..., begin_step: _Optional[int] = ..., num_snapshots: _Optional[int] = ..., probe_loss: _Optional[float] = ...) -> None: ...

class ProbePoint(_message.Message):
    __slots__ = ("step", "losses")
    class LossesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    step: int
    losses: _containers.ScalarMap[str, float]
    def __init__(self, step: _Optional[int] = ..., losses: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ProbeStatus(_message.Message):
    __slots__ = ("points", "best", "fault", "kept")
    POINTS_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    FAULT_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    points: _containers.RepeatedCompositeFieldContainer[ProbePoint]
    best: str
    fault: str
    kept: _containers.RepeatedCompositeFieldContainer[ReadOutStatus]
    def __init__(self, points: _Optional[_Iterable[_Union[ProbePoint, _Mapping]]] = ..., best: _Optional[str] = ..., fault: _Optional[str] = ..., kept: _Optional[_Iterable[_Union[ReadOutStatus, _Mapping]]] = ...) -> None: ...

class SessionStatus(_message.Message):
    __slots__ = ("session_id", "run_id", "predictor", "world_size", "num_joined", "num_parameters", "epoch", "history_steps", "num_committed", "num_aborted", "num_published", "num_failed", "num_applied", "num_rolled_back", "idle_seconds", "context_len", "read_outs", "probe", "tenant", "num_accepted", "num_rejected", "snapshot_step", "snapshot_age_seconds", "promised_bytes", "recent_nowcasts", "policy", "snapshot_interval_steps", "is_paused", "may_pause")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    PREDICTOR_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_JOINED_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HISTORY_STEPS_FIELD_NUMBER: _ClassVar[int]
    NUM_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ABORTED_FIELD_NUMBER: _ClassVar[int]
    NUM_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_FAILED_FIELD_NUMBER: _ClassVar[int]
    NUM_APPLIED_FIELD_NUMBER: _ClassVar[int]
    NUM_ROLLED_BACK_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LEN_FIELD_NUMBER: _ClassVar[int]
    READ_OUTS_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    NUM_REJECTED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_STEP_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PROMISED_BYTES_FIELD_NUMBER: _ClassVar[int]
    RECENT_NOWCASTS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_INTERVAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    IS_PAUSED_FIELD_NUMBER: _ClassVar[int]
    MAY_PAUSE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    run_id: str
    predictor: str
    world_size: int
    num_joined: int
    num_parameters: int
    epoch: int
    history_steps: _containers.RepeatedScalarFieldContainer[int]
    num_committed: int
    num_aborted: int
    num_published: int
    num_failed: int
    num_applied: int
    num_rolled_back: int
    idle_seconds: float
    context_len: int
    read_outs: _containers.RepeatedCompositeFieldContainer[ReadOutStatus]
    probe: ProbeStatus
    tenant: str
    num_accepted: int
    num_rejected: int
    snapshot_step: int
    snapshot_age_seconds: float
    promised_bytes: int
    recent_nowcasts: _containers.RepeatedCompositeFieldContainer[NowcastStatus]
    policy: str
    snapshot_interval_steps: int
    is_paused: bool
    may_pause: bool
    def __init__(self, session_id: _Optional[str] = ..., run_id: _Optional[str] = ..., predictor: _Optional[str] = ..., world_size: _Optional[int] = ..., num_joined: _Optional[int] = ..., num_parameters: _Optional[int] = ..., epoch: _Optional[int] = ..., history_steps: _Optional[_Iterable[int]] = ..., num_committed: _Optional[int] = ..., num_aborted: _Optional[int] = ..., num_published: _Optional[int] = ..., num_failed: _Optional[int] = ..., num_applied: _Optional[int] = ..., num_rolled_back: _Optional[int] = ..., idle_seconds: _Optional[float] = ..., context_len: _Optional[int] = ..., read_outs: _Optional[_Iterable[_Union[ReadOutStatus, _Mapping]]] = ..., probe: _Optional[_Union[ProbeStatus, _Mapping]] = ..., tenant: _Optional[str] = ..., num_accepted: _Optional[int] = ..., num_rejected: _Optional[int] = ..., snapshot_step: _Optional[int] = ..., snapshot_age_seconds: _Optional[float] = ..., promised_bytes: _Optional[int] = ..., recent_nowcasts: _Optional[_Iterable[_Union[NowcastStatus, _Mapping]]] = ..., policy: _Optional[str] = ..., snapshot_interval_steps: _Optional[int] = ..., is_paused: _Optional[bool] = ..., may_pause: _Optional[bool] = ...) -> None: ...

class NowcastStatus(_message.Message):
    __slots__ = ("version", "base_step", "horizon_intervals", "relative_norm", "nowcast_seconds", "age_seconds", "outcome", "failure")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    HORIZON_INTERVALS_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_NORM_FIELD_NUMBER: _ClassVar[int]
    NOWCAST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    version: int
    base_step: int
    horizon_intervals: int
    relative_norm: float
    nowcast_seconds: float
    age_seconds: float
    outcome: str
    failure: str
    def __init__(self, version: _Optional[int] = ..., base_step: _Optional[int] = ..., horizon_intervals: _Optional[int] = ..., relative_norm: _Optional[float] = ..., nowcast_seconds: _Optional[float] = ..., age_seconds: _Optional[float] = ..., outcome: _Optional[str] = ..., failure: _Optional[str] = ...) -> None: ...

class QueueStatus(_message.Message):
    __slots__ = ("work", "is_busy", "num_waiting", "run_id")
    WORK_FIELD_NUMBER: _ClassVar[int]
    IS_BUSY_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    work: str
    is_busy: bool
    num_waiting: int
    run_id: str
    def __init__(self, work: _Optional[str] = ..., is_busy: _Optional[bool] = ..., num_waiting: _Optional[int] = ..., run_id: _Optional[str] = ...) -> None: ...

class EnginesStatus(_message.Message):
    __slots__ = ("num_engines", "threads", "gpus", "device")
    NUM_ENGINES_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    num_engines: int
    threads: int
    gpus: float
    device: str
    def __init__(self, num_engines: _Optional[int] = ..., threads: _Optional[int] = ..., gpus: _Optional[float] = ..., device: _Optional[str] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("service_version", "uptime_seconds", "history_bytes", "history_budget_bytes", "sessions", "engines_fault", "run_budget_bytes", "queues", "engines")
    SERVICE_VERSION_FIELD_NUMBER: _ClassVar[int]
    UPTIME_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HISTORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    HISTORY_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FAULT_FIELD_NUMBER: _ClassVar[int]
    RUN_BUDGET_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    ENGINES_FIELD_NUMBER: _ClassVar[int]
    service_version: str
    uptime_seconds: float
    history_bytes: int
    history_budget_bytes: int
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStatus]
    engines_fault: str
    run_budget_bytes: int
    queues: _containers.RepeatedCompositeFieldContainer[QueueStatus]
    engines: EnginesStatus
    def __init__(self, service_version: _Optional[str] = ..., uptime_seconds: _Optional[float] = ..., history_bytes: _Optional[int] = ..., history_budget_bytes: _Optional[int] = ..., sessions: _Optional[_Iterable[_Union[SessionStatus, _Mapping]]] = ..., engines_fault: _Optional[str] = ..., run_budget_bytes: _Optional[int] = ..., queues: _Optional[_Iterable[_Union[QueueStatus, _Mapping]]] = ..., engines: _Optional[_Union[EnginesStatus, _Mapping]] = ...) -> None: ...
