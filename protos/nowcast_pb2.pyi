from sidecast.protos import nowcast_status_pb2 as _nowcast_status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union
from sidecast.protos.nowcast_status_pb2 import StatusRequest as StatusRequest
from sidecast.protos.nowcast_status_pb2 import ReadOutStatus as ReadOutStatus
from sidecast.protos.nowcast_status_pb2 import ProbePoint as ProbePoint
from sidecast.protos.nowcast_status_pb2 import ProbeStatus as ProbeStatus
from sidecast.protos.nowcast_status_pb2 import SessionStatus as SessionStatus
from sidecast.protos.nowcast_status_pb2 import NowcastStatus as NowcastStatus
from sidecast.protos.nowcast_status_pb2 import QueueStatus as QueueStatus
from sidecast.protos.nowcast_status_pb2 import EnginesStatus as EnginesStatus
from sidecast.protos.nowcast_status_pb2 import StatusReply as StatusReply

DESCRIPTOR: _descriptor.FileDescriptor

class RefusalKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_KIND_UNSPECIFIED: _ClassVar[RefusalKind]
    MALFORMED: _ClassVar[RefusalKind]
    UNAUTHENTICATED: _ClassVar[RefusalKind]
    INCOMPATIBLE: _ClassVar[RefusalKind]
    UNKNOWN_SESSION: _ClassVar[RefusalKind]
    OUTDATED: _ClassVar[RefusalKind]
    NOT_JOINED: _ClassVar[RefusalKind]
    MISSING_REFERENCE: _ClassVar[RefusalKind]
    CORRUPT: _ClassVar[RefusalKind]
    SATURATED: _ClassVar[RefusalKind]
    FAILED: _ClassVar[RefusalKind]
    FORBIDDEN: _ClassVar[RefusalKind]

class WireDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FP32: _ClassVar[WireDtype]
    BF16: _ClassVar[WireDtype]
REFUSAL_KIND_UNSPECIFIED: RefusalKind
MALFORMED: RefusalKind
UNAUTHENTICATED: RefusalKind
INCOMPATIBLE: RefusalKind
UNKNOWN_SESSION: RefusalKind
OUTDATED: RefusalKind
NOT_JOINED: RefusalKind
MISSING_REFERENCE: RefusalKind
CORRUPT: RefusalKind
SATURATED: RefusalKind
FAILED: RefusalKind
FORBIDDEN: RefusalKind
FP32: WireDtype
BF16: WireDtype

class Parameter(_message.Message):
    __slots__ = ("fqn", "shape")
    FQN_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    fqn: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, fqn: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Manifest(_message.Message):
    __slots__ = ("parameters", "config_json", "aliases")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    parameters: _containers.RepeatedCompositeFieldContainer[Parameter]
    config_json: str
    aliases: _containers.ScalarMap[str, str]
    def __init__(self, parameters: _Optional[_Iterable[_Union[Parameter, _Mapping]]] = ..., config_json: _Optional[str] = ..., aliases: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Horizon(_message.Message):
    __slots__ = ("schedule", "max_intervals", "power")
    SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    MAX_INTERVALS_FIELD_NUMBER: _ClassVar[int]
    POWER_FIELD_NUMBER: _ClassVar[int]
    schedule: str
    max_intervals: int
    power: float
    def __init__(self, schedule: _Optional[str] = ..., max_intervals: _Optional[int] = ..., power: _Optional[float] = ...) -> None: ...

class Push(_message.Message):
    __slots__ = ("time_constant_steps", "gain", "start_step", "stop_step", "max_relative_norm")
    TIME_CONSTANT_STEPS_FIELD_NUMBER: _ClassVar[int]
    GAIN_FIELD_NUMBER: _ClassVar[int]
    START_STEP_FIELD_NUMBER: _ClassVar[int]
    STOP_STEP_FIELD_NUMBER: _ClassVar[int]
    MAX_RELATIVE_NORM_FIELD_NUMBER: _ClassVar[int]
    time_constant_steps: float
    gain: float
    start_step: int
    stop_step: int
    max_relative_norm: float
    def __init__(self, time_constant_steps: _Optional[float] = ..., gain: _Optional[float] = ..., start_step: _Optional[int] = ..., stop_step: _Optional[int] = ..., max_relative_norm: _Optional[float] = ...) -> None: ...

class OpenRequest(_message.Message):
    __slots__ = ("session_id", "run_id", "world_size", "manifest", "schema_hash", "context_len", "snapshot_interval_steps", "period_steps", "max_steps", "horizon", "predictor", "predictor_options_json", "max_relative_norm", "resumed", "resume_step", "resume_epoch", "wire_dtype", "protocol_version", "push", "read_outs", "keep_best", "can_pause")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_HASH_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LEN_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_INTERVAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    PERIOD_STEPS_FIELD_NUMBER: _ClassVar[int]
    MAX_STEPS_FIELD_NUMBER: _ClassVar[int]
    HORIZON_FIELD_NUMBER: _ClassVar[int]
    PREDICTOR_FIELD_NUMBER: _ClassVar[int]
    PREDICTOR_OPTIONS_JSON_FIELD_NUMBER: _ClassVar[int]
    MAX_RELATIVE_NORM_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    RESUME_STEP_FIELD_NUMBER: _ClassVar[int]
    RESUME_EPOCH_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    READ_OUTS_FIELD_NUMBER: _ClassVar[int]
    KEEP_BEST_FIELD_NUMBER: _ClassVar[int]
    CAN_PAUSE_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    run_id: str
    world_size: int
    manifest: Manifest
    schema_hash: str
    context_len: int
    snapshot_interval_steps: int
    period_steps: int
    max_steps: int
    horizon: Horizon
    predictor: str
    predictor_options_json: str
    max_relative_norm: float
    resumed: bool
    resume_step: int
    resume_epoch: int
    wire_dtype: WireDtype
    protocol_version: int
    push: Push
    read_outs: _containers.RepeatedScalarFieldContainer[str]
    keep_best: int
    can_pause: bool
    def __init__(self, session_id: _Optional[str] = ..., run_id: _Optional[str] = ..., world_size: _Optional[int] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ..., schema_hash: _Optional[str] = ..., context_len: _Optional[int] = ..., snapshot_interval_steps: _Optional[int] = ..., period_steps: _Optional[int] = ..., max_steps: _Optional[int] = ..., horizon: _Optional[_Union[Horizon, _Mapping]] = ..., predictor: _Optional[str] = ..., predictor_options_json: _Optional[str] = ..., max_relative_norm: _Optional[float] = ..., resumed: _Optional[bool] = ..., resume_step: _Optional[int] = ..., resume_epoch: _Optional[int] = ..., wire_dtype: _Optional[_Union[WireDtype, str]] = ..., protocol_version: _Optional[int] = ..., push: _Optional[_Union[Push, _Mapping]] = ..., read_outs: _Optional[_Iterable[str]] = ..., keep_best: _Optional[int] = ..., can_pause: _Optional[bool] = ...) -> None: ...

class OpenReply(_message.Message):
    __slots__ = ("chunk_bytes", "protocol_version")
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    chunk_bytes: int
    protocol_version: int
    def __init__(self, chunk_bytes: _Optional[int] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("parameter", "start", "stop")
    PARAMETER_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    parameter: int
    start: int
    stop: int
    def __init__(self, parameter: _Optional[int] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("session_id", "rank", "upload_shards", "fetch_shards")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_SHARDS_FIELD_NUMBER: _ClassVar[int]
    FETCH_SHARDS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    rank: int
    upload_shards: _containers.RepeatedCompositeFieldContainer[Shard]
    fetch_shards: _containers.RepeatedCompositeFieldContainer[Shard]
    def __init__(self, session_id: _Optional[str] = ..., rank: _Optional[int] = ..., upload_shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., fetch_shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("chunk_bytes", "local_socket", "local_ticket", "is_paused")
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    LOCAL_SOCKET_FIELD_NUMBER: _ClassVar[int]
    LOCAL_TICKET_FIELD_NUMBER: _ClassVar[int]
    IS_PAUSED_FIELD_NUMBER: _ClassVar[int]
    chunk_bytes: int
    local_socket: str
    local_ticket: bytes
    is_paused: bool
    def __init__(self, chunk_bytes: _Optional[int] = ..., local_socket: _Optional[str] = ..., local_ticket: _Optional[bytes] = ..., is_paused: _Optional[bool] = ...) -> None: ...

class ChunkKey(_message.Message):
    __slots__ = ("session_id", "rank", "id", "epoch", "dtype", "base_step")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    rank: int
    id: int
    epoch: int
    dtype: WireDtype
    base_step: int
    def __init__(self, session_id: _Optional[str] = ..., rank: _Optional[int] = ..., id: _Optional[int] = ..., epoch: _Optional[int] = ..., dtype: _Optional[_Union[WireDtype, str]] = ..., base_step: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("key", "offset_bytes", "crc32", "data", "shared_bytes", "shared_buffer")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHARED_BUFFER_FIELD_NUMBER: _ClassVar[int]
    key: ChunkKey
    offset_bytes: int
    crc32: int
    data: bytes
    shared_bytes: int
    shared_buffer: int
    def __init__(self, key: _Optional[_Union[ChunkKey, _Mapping]] = ..., offset_bytes: _Optional[int] = ..., crc32: _Optional[int] = ..., data: _Optional[bytes] = ..., shared_bytes: _Optional[int] = ..., shared_buffer: _Optional[int] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ProgressRequest(_message.Message):
    __slots__ = ("key",)
    KEY_FIELD_NUMBER: _ClassVar[int]
    key: ChunkKey
    def __init__(self, key: _Optional[_Union[ChunkKey, _Mapping]] = ...) -> None: ...

class ByteRange(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class ProgressReply(_message.Message):
    __slots__ = ("received",)
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    received: _containers.RepeatedCompositeFieldContainer[ByteRange]
    def __init__(self, received: _Optional[_Iterable[_Union[ByteRange, _Mapping]]] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("session_id", "rank", "step", "epoch", "num_bytes", "digest", "dtype", "base_step", "learning_rate_sum", "applied_version", "applied_weight")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_SUM_FIELD_NUMBER: _ClassVar[int]
    APPLIED_VERSION_FIELD_NUMBER: _ClassVar[int]
    APPLIED_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    rank: int
    step: int
    epoch: int
    num_bytes: int
    digest: bytes
    dtype: WireDtype
    base_step: int
    learning_rate_sum: float
    applied_version: int
    applied_weight: float
    def __init__(self, session_id: _Optional[str] = ..., rank: _Optional[int] = ..., step: _Optional[int] = ..., epoch: _Optional[int] = ..., num_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ..., dtype: _Optional[_Union[WireDtype, str]] = ..., base_step: _Optional[int] = ..., learning_rate_sum: _Optional[float] = ..., applied_version: _Optional[int] = ..., applied_weight: _Optional[float] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("session_id", "rank")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    rank: int
    def __init__(self, session_id: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class SnapshotCommitted(_message.Message):
    __slots__ = ("step", "epoch")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ...) -> None: ...

class SnapshotAborted(_message.Message):
    __slots__ = ("step", "epoch", "reason")
    STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    step: int
    epoch: int
    reason: str
    def __init__(self, step: _Optional[int] = ..., epoch: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PredictionPublished(_message.Message):
    __slots__ = ("version", "base_step", "epoch", "horizon_intervals", "digest", "relative_norm", "nowcast_seconds")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    HORIZON_INTERVALS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_NORM_FIELD_NUMBER: _ClassVar[int]
    NOWCAST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    version: int
    base_step: int
    epoch: int
    horizon_intervals: int
    digest: int
    relative_norm: float
    nowcast_seconds: float
    def __init__(self, version: _Optional[int] = ..., base_step: _Optional[int] = ..., epoch: _Optional[int] = ..., horizon_intervals: _Optional[int] = ..., digest: _Optional[int] = ..., relative_norm: _Optional[float] = ..., nowcast_seconds: _Optional[float] = ...) -> None: ...

class PredictionFailed(_message.Message):
    __slots__ = ("base_step", "reason")
    BASE_STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    base_step: int
    reason: str
    def __init__(self, base_step: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class PauseChanged(_message.Message):
    __slots__ = ("is_paused",)
    IS_PAUSED_FIELD_NUMBER: _ClassVar[int]
    is_paused: bool
    def __init__(self, is_paused: _Optional[bool] = ...) -> None: ...

class SessionEvent(_message.Message):
    __slots__ = ("pause", "committed", "aborted", "published", "failed")
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    pause: PauseChanged
    committed: SnapshotCommitted
    aborted: SnapshotAborted
    published: PredictionPublished
    failed: PredictionFailed
    def __init__(self, pause: _Optional[_Union[PauseChanged, _Mapping]] = ..., committed: _Optional[_Union[SnapshotCommitted, _Mapping]] = ..., aborted: _Optional[_Union[SnapshotAborted, _Mapping]] = ..., published: _Optional[_Union[PredictionPublished, _Mapping]] = ..., failed: _Optional[_Union[PredictionFailed, _Mapping]] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("session_id", "rank", "version", "offset_bytes", "num_bytes", "dtype", "into_shared")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    INTO_SHARED_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    rank: int
    version: int
    offset_bytes: int
    num_bytes: int
    dtype: WireDtype
    into_shared: bool
    def __init__(self, session_id: _Optional[str] = ..., rank: _Optional[int] = ..., version: _Optional[int] = ..., offset_bytes: _Optional[int] = ..., num_bytes: _Optional[int] = ..., dtype: _Optional[_Union[WireDtype, str]] = ..., into_shared: _Optional[bool] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("session_id", "rank", "version", "outcome", "epoch")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[ReportRequest.Outcome]
        APPLIED: _ClassVar[ReportRequest.Outcome]
        ACCEPTED: _ClassVar[ReportRequest.Outcome]
        ROLLED_BACK: _ClassVar[ReportRequest.Outcome]
        REJECTED: _ClassVar[ReportRequest.Outcome]
    OUTCOME_UNSPECIFIED: ReportRequest.Outcome
    APPLIED: ReportRequest.Outcome
    ACCEPTED: ReportRequest.Outcome
    ROLLED_BACK: ReportRequest.Outcome
    REJECTED: ReportRequest.Outcome
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    rank: int
    version: int
    outcome: ReportRequest.Outcome
    epoch: int
    def __init__(self, session_id: _Optional[str] = ..., rank: _Optional[int] = ..., version: _Optional[int] = ..., outcome: _Optional[_Union[ReportRequest.Outcome, str]] = ..., epoch: _Optional[int] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ("run_id", "is_paused")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    IS_PAUSED_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    is_paused: bool
    def __init__(self, run_id: _Optional[str] = ..., is_paused: _Optional[bool] = ...) -> None: ...

class PauseReply(_message.Message):
    __slots__ = ("has_changed",)
    HAS_CHANGED_FIELD_NUMBER: _ClassVar[int]
    has_changed: bool
    def __init__(self, has_changed: _Optional[bool] = ...) -> None: ...

class ReadOutRequest(_message.Message):
    __slots__ = ("run_id", "name")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    name: str
    def __init__(self, run_id: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ReadOutDescription(_message.Message):
    __slots__ = ("status", "digest", "manifest")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    status: _nowcast_status_pb2.ReadOutStatus
    digest: int
    manifest: Manifest
    def __init__(self, status: _Optional[_Union[_nowcast_status_pb2.ReadOutStatus, _Mapping]] = ..., digest: _Optional[int] = ..., manifest: _Optional[_Union[Manifest, _Mapping]] = ...) -> None: ...

class ReadOutPart(_message.Message):
    __slots__ = ("description", "offset_bytes", "crc32", "data")
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    OFFSET_BYTES_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    description: ReadOutDescription
    offset_bytes: int
    crc32: int
    data: bytes
    def __init__(self, description: _Optional[_Union[ReadOutDescription, _Mapping]] = ..., offset_bytes: _Optional[int] = ..., crc32: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...
