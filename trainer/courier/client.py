"""A rank's calls to the service. The home of grpc on the training side; runs in the courier, without torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zlib import crc32

import grpc

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos import nowcast_pb2_grpc
from sidecast.protos.codec import ChunkFrame, decode_chunk, encode_chunk
from sidecast.protos.shards import ShardSpec
from sidecast.protos.transport import AUTHORIZATION_KEY, BULK_OPTIONS, RUN_SECRET_KEY, SERVICE_NAME
from sidecast.protos.version import PROTOCOL_VERSION, version_fault
from sidecast.trainer.courier.fetch import Download, FetchPart
from sidecast.trainer.courier.handover import hand_over
from sidecast.trainer.courier.refusals import CorruptError, RefusedError, UnavailableError, translated
from sidecast.trainer.courier.throttle import Throttle
from sidecast.trainer.courier.upload import Upload
from sidecast.trainer.pipe.messages import ClientSettings, Snapshot

KEEPALIVE_MS = 20_000


class EventStream:
    """A session's events; may be ended from another thread.

    Args:
        call: The streaming call.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[pb.SessionEvent]:
        """Yields events until the session ends; raises when the connection does, or after ``cancel``."""
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise translated(error) from error

    def cancel(self) -> None:
        self._call.cancel()


class NowcastClient:
    """One rank's connections.

    Args:
        config: Where the service is and how long to wait for it.
        shared: Descriptors of the rank's buffers, the prediction buffer last; none if they are not to be shared.

    Attributes:
        chunk_bytes: Size of chunks, as the service wants them.
        is_sharing: Whether the service has mapped the buffers, so that chunks need not hold their bytes.
    """

    def __init__(self, config: ClientSettings, shared: Sequence[int] = ()) -> None:
        self._config = config
        self._token = () if config.token_file is None else _token(config.token_file)
        self._run_secret: tuple[tuple[str, str], ...] = ()
        self._options = [
            *BULK_OPTIONS,
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_permit_without_calls", 1),
            # A service that comes back is found within about a second, however long it was away. The minimum is
            # the time for one attempt: by default a listener that accepts but never answers would cost 20 s.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.min_reconnect_backoff_ms", int(config.connect_s * 1000)),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            # Training hosts often have proxies for the web, which cannot carry this.
            ("grpc.enable_http_proxy", 0),
            # Channels to one address would otherwise share one connection.
            ("grpc.use_local_subchannel_pool", 1),
        ]
        # Small calls and events have a connection of their own, where no bulk is before them.
        self._channel = self._connect()
        self._stub = nowcast_pb2_grpc.NowcasterStub(self._channel)
        self._bulk_channels = [self._connect() for _ in range(config.channels)]
        self._throttle = Throttle(config.max_bytes_per_s)
        self.chunk_bytes = 1 << 20
        self.is_sharing = False
        self._shared = tuple(shared)

    def _connect(self) -> grpc.Channel:
        config = self._config
        if config.tls_ca is None:
            return grpc.insecure_channel(config.endpoint, self._options)
        key, certificate = (
            None if path is None else Path(path).read_bytes() for path in (config.tls_key, config.tls_cert)
        )
        credentials = grpc.ssl_channel_credentials(Path(config.tls_ca).read_bytes(), key, certificate)
        return grpc.secure_channel(config.endpoint, credentials, self._options)

    def close(self) -> None:
        for channel in (self._channel, *self._bulk_channels):
            channel.close()

    def act_for(self, run_secret: str) -> None:
        """Makes all calls from now on those of a run, whose secret they show."""
        self._run_secret = ((RUN_SECRET_KEY, run_secret),)

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call shows: the token as it is now, since a service that goes on takes another one at any time."""
        if self._config.token_file is not None:
            # It may be on its way to being another one, and not be there, or be empty, for a moment.
            with contextlib.suppress(OSError, UnicodeError):
                self._token = _token(self._config.token_file) or self._token
        return (*self._token, *self._run_secret)

    def wait_reachable(self) -> None:
        """Raises UnavailableError unless the service answers within the connect timeout."""
        # A call and not a subscription to the channel's state: subscriptions that time out stay with the channel.
        try:
            self._call(
                self._stub.Status, pb.StatusRequest(without_sessions=True), self._config.connect_s, wait_for_ready=True
            )
        except UnavailableError as error:
            raise UnavailableError(
                f"no nowcaster service at {self._config.endpoint} within {self._config.connect_s:g} s"
            ) from error

    def open(self, request: pb.OpenRequest) -> None:
        """Announces the run (rank 0). May take as long as the predictor needs to set itself up.

        Raises:
            RefusedError: The run can never be served, or one side does not speak the other's version of the protocol.
        """
        reply = self._call(self._stub.Open, request, self.open_s)
        fault = version_fault("service", reply.protocol_version)
        if fault:
            raise RefusedError(fault)
        self.chunk_bytes = reply.chunk_bytes

    def join(
        self, session_id: str, rank: int, upload_shards: Sequence[ShardSpec], fetch_shards: Sequence[ShardSpec]
    ) -> bool:
        """Names this rank's ranges, and shares its buffers if the service is on this host.

        Returns:
            Whether the run is to apply nothing.
        """
        request = pb.JoinRequest(
            session_id=session_id,
            rank=rank,
            upload_shards=[_shard(item) for item in upload_shards],
            fetch_shards=[_shard(item) for item in fetch_shards],
        )
        reply = self._call(self._stub.Join, request, self.call_s)
        self.chunk_bytes = reply.chunk_bytes
        self.is_sharing = hand_over(self._config.endpoint, reply.local_socket, reply.local_ticket, self._shared)
        return reply.is_paused

    def upload(self, upload: Upload) -> None:
        """Sends what an upload still holds, over all bulk connections at once.

        Raises:
            UnavailableError: The service went away; what it has can be asked for with ``progress``.
        """

        def frames() -> Iterator[ChunkFrame]:
            for frame in upload.frames():
                self._throttle.pass_bytes(len(frame.data))
                yield frame

        timeout_s = self.transfer_s(upload.num_bytes)
        calls = [
            channel.stream_unary(
                f"/{SERVICE_NAME}/Upload",
                request_serializer=encode_chunk,
                response_deserializer=pb.UploadReply.FromString,
            ).future(frames(), timeout=timeout_s, metadata=self._metadata)
            for channel in self._bulk_channels
        ]
        try:
            for call in calls:
                call.result()
        except grpc.RpcError as error:
            raise translated(error) from error
        finally:
            for call in calls:
                call.cancel()

    def progress(self, key: pb.ChunkKey) -> list[tuple[int, int]]:
        """Which bytes of an upload have arrived: ``(start, stop)``, disjoint and rising."""
        reply = self._call(self._stub.Progress, pb.ProgressRequest(key=key), self.call_s)
        return [(item.start, item.stop) for item in reply.received]

    def commit(self, upload: Upload, snapshot: Snapshot) -> None:
        """Seals the upload of a snapshot."""
        key, applied = upload.key, snapshot.applied
        request = pb.CommitRequest(
            session_id=key.session_id,
            rank=key.rank,
            step=key.id,
            epoch=key.epoch,
            num_bytes=upload.num_bytes,
            digest=upload.digest,
            dtype=key.dtype,
            base_step=key.base_step,
            learning_rate_sum=snapshot.learning_rate_sum,
            applied_version=0 if applied is None else applied.version,
            applied_weight=0.0 if applied is None else applied.weight,
        )
        self._call(self._stub.Commit, request, self.call_s)

    def watch(self, session_id: str, rank: int) -> EventStream:
        """Asks for the session's events."""
        return EventStream(self._stub.Watch(pb.WatchRequest(session_id=session_id, rank=rank), metadata=self._metadata))

    def new_download(self, key: pb.ChunkKey, buffer: memoryview) -> Download:
        """A download with a part for each bulk connection."""
        return Download(key, buffer, len(self._bulk_channels), self.chunk_bytes, is_shared=self.is_sharing)

    def fetch(self, download: Download) -> None:
        """Receives what a download still lacks, over all bulk connections at once.

        Raises:
            CorruptError: A chunk is damaged, out of place, or missing.
            UnavailableError: The service went away; calling again goes on from there.
        """
        missing = [part for part in download.parts if not part.is_whole]
        with ThreadPoolExecutor(max(1, len(missing))) as pool:
            work = zip(missing, self._bulk_channels, strict=False)
            for future in [pool.submit(self._fetch_part, download, part, channel) for part, channel in work]:
                future.result()

    def _fetch_part(self, download: Download, part: FetchPart, channel: grpc.Channel) -> None:
        version = download.key.id
        stream = channel.unary_stream(
            f"/{SERVICE_NAME}/Fetch",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=decode_chunk,
        )
        request = pb.FetchRequest(
            session_id=download.key.session_id,
            rank=download.key.rank,
            version=version,
            offset_bytes=part.position,
            num_bytes=part.stop - part.position,
            dtype=download.key.dtype,
            into_shared=download.is_shared,
        )
        call = stream(request, timeout=self.transfer_s(download.num_bytes), metadata=self._metadata)
        try:
            for frame in call:
                data = download.at(frame.offset_bytes, frame.shared_bytes) if download.is_shared else frame.data
                end = part.position + len(data)
                if frame.offset_bytes != part.position or end > part.stop:
                    raise CorruptError(
                        f"version {version}: a chunk at byte {frame.offset_bytes} came at {part.position}"
                    )
                if frame.key.id != version or crc32(data) != frame.crc32:
                    raise CorruptError(
                        f"version {version}: the chunk at byte {part.position} fails its checksum or version"
                    )
                if not download.is_shared:
                    download.put(part.position, data)
                    self._throttle.pass_bytes(len(data))
                part.position = end
        except grpc.RpcError as error:
            raise translated(error) from error
        finally:
            # After a bad chunk the service would go on offering the rest, and keep the prediction for it.
            call.cancel()
        if not part.is_whole:
            raise CorruptError(f"version {version}: bytes {part.position} to {part.stop} did not come")

    def transfer_s(self, num_bytes: int) -> float:
        """How long the transfer of so many bytes may take."""
        # A throttle that needs longer than the timeout is meant, not a fault.
        return self._config.stream_s + self._throttle.least_s(num_bytes)

    @property
    def open_s(self) -> float:
        """How long the announcement of a run may take."""
        return self._config.stream_s

    @property
    def call_s(self) -> float:
        """How long a small call may take."""
        return self._config.chunk_s

    def report(self, request: pb.ReportRequest) -> None:
        """Tells what was done with a prediction."""
        self._call(self._stub.Report, request, self.call_s)

    def _call(self, method: Any, request: Any, timeout_s: float, *, wait_for_ready: bool = False) -> Any:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata, wait_for_ready=wait_for_ready)
        except grpc.RpcError as error:
            raise translated(error) from error


def open_request(
    fields: Mapping[str, Any], parameters: Sequence[tuple[str, Sequence[int]]], config_json: str
) -> pb.OpenRequest:
    """Builds the announcement from plain values.

    Args:
        fields: Scalar fields of OpenRequest by name, ``horizon``, ``aliases`` and ``push`` as mappings, the last one
            None or missing for a run without.
        parameters: ``(fqn, shape)`` of every parameter, in manifest order.
        config_json: The model's configuration.
    """
    scalars = {name: value for name, value in fields.items() if name not in ("horizon", "aliases", "push")}
    push = fields.get("push")
    return pb.OpenRequest(
        **scalars,
        protocol_version=PROTOCOL_VERSION,
        horizon=pb.Horizon(**fields["horizon"]),
        push=None if push is None else pb.Push(**push),
        manifest=pb.Manifest(
            parameters=[pb.Parameter(fqn=fqn, shape=shape) for fqn, shape in parameters],
            config_json=config_json,
            aliases=fields["aliases"],
        ),
    )


def _token(path: str) -> tuple[tuple[str, str], ...]:
    token = Path(path).read_text().strip()
    return ((AUTHORIZATION_KEY, f"Bearer {token}"),) if token else ()


def _shard(shard: ShardSpec) -> pb.Shard:
    return pb.Shard(parameter=shard.parameter, start=shard.start, stop=shard.stop)
