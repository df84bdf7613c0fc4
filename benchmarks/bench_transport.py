"""One rank's upload and download of a snapshot on loopback, against plain TCP with the same checksums and copies.

The rank's real client and the real servicer, in processes of their own; the peer's two ends run in the same two
processes, so that repetitions of both alternate. Prints one JSON line per case and a table at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
from prometheus_client import CollectorRegistry

from benchmarks.tcp_peer import TcpClient, serve_tcp
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.access.callers import callers_of
from sidecast.nowcaster_service.config import ServiceConfig
from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.nowcaster_service.nowcasting import NowcastAnswer, NowcastRequest, PredictorAnswer, PredictorRequest
from sidecast.nowcaster_service.server import create_server
from sidecast.nowcaster_service.servicer import Servicer
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import decode_chunk, encode_chunk
from sidecast.protos.shards import ShardSpec
from sidecast.protos.transport import BULK_OPTIONS, SERVICE_NAME
from sidecast.trainer.courier.client import NowcastClient, open_request
from sidecast.trainer.courier.upload import Upload
from sidecast.trainer.hook.courier_handle import courier_environment
from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.messages import ClientSettings, Snapshot

MIB = 1 << 20
PARAMETER_BYTES = 32 * MIB
CONTEXT_LEN = 2
# Until the history is full, every snapshot takes new files, on both sides of the comparison.
NUM_WARM_UPS = CONTEXT_LEN + 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured."""

    num_mib: int
    repetitions: int
    chunk_kib: int = 1024
    channels: int = 1
    server: str = "aio"
    shared: bool = False

    @property
    def num_bytes(self) -> int:
        return self.num_mib * MIB


def manifest_of(case: Case) -> ModelManifest:
    """A model of that size, cut like a transformer's matrices."""
    count = max(1, case.num_bytes // PARAMETER_BYTES)
    return ModelManifest.from_shapes([(f"w{i}", (case.num_bytes // count // 4,)) for i in range(count)], {})


# --- the service's process


class CopyEngines:
    """Predicts a change that is the newest state, so that there is something to fetch."""

    async def check(self, request: PredictorRequest) -> PredictorAnswer:
        return PredictorAnswer(max_horizon=1)

    async def ready(self) -> None:
        """They always are."""

    async def replace(self) -> None:
        raise AssertionError("nothing takes long here")

    def fault(self) -> str:
        return ""

    async def predict(self, request: NowcastRequest) -> NowcastAnswer:
        newest = np.memmap(request.state_paths[-1], np.uint8, "r")
        np.memmap(request.delta_path, np.uint8, "r+")[:] = newest
        return NowcastAnswer(digest=1, relative_norm=0.1, nowcast_s=0.1)


def serve(case: Case, folder: Path) -> None:
    """Serves gRPC and the peer until killed; prints both ports."""
    config = ServiceConfig(
        host="127.0.0.1",
        port=1,
        metrics_port=None,
        weights=None,
        history_dir=folder / "grpc",
        history_budget_bytes=64 << 30,
        chunk_bytes=case.chunk_kib << 10,
        num_engines=1,
        engine_threads=1,
        engine_gpus=0.0,
        device=None,
        nowcast_timeout_s=100.0,
        session_timeout_s=1000.0,
        tls=None,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    peer_store = HistoryStore(folder / "tcp", 64 << 30)
    peer = (listener, peer_store, case.num_bytes, case.chunk_kib << 10)
    threading.Thread(target=serve_tcp, args=peer, daemon=True).start()
    asyncio.run(_serve_grpc(config, case.server, listener.getsockname()[1]))


async def _serve_grpc(config: ServiceConfig, kind: str, peer_port: int) -> None:
    store = HistoryStore(config.history_dir, config.history_budget_bytes)
    servicer = Servicer(config, store, CopyEngines(), ServiceMetrics(CollectorRegistry()), version="bench")
    server, port = create_server(servicer, callers_of(config), 0)
    servicer.handover.start()
    await server.start()
    bulk_port = port if kind == "aio" else _serve_in_threads(servicer, asyncio.get_running_loop())
    print(json.dumps([port, bulk_port, peer_port]), flush=True)
    await server.wait_for_termination()


def _serve_in_threads(servicer: Servicer, loop: asyncio.AbstractEventLoop) -> int:
    """The same sessions behind gRPC's threaded server: bulk in its threads, the rest on the loop."""

    def on_loop(method: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
        return lambda request, context: asyncio.run_coroutine_threadsafe(method(request), loop).result()

    def upload(messages: Iterator[bytes], context: grpc.ServicerContext) -> pb.UploadReply:
        for message in messages:
            frame = decode_chunk(message)
            servicer.sessions.get(frame.key.session_id).receive(frame)
        return pb.UploadReply()

    def from_loop(method: Callable[[Any], Any]) -> Callable[[Any, Any], Iterator[Any]]:
        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            items = method(request)
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield asyncio.run_coroutine_threadsafe(anext(items), loop).result()

        return stream

    def plain(message: Any) -> bytes:
        return bytes(message.SerializeToString())

    unary = grpc.unary_unary_rpc_method_handler
    methods = {
        "Open": unary(on_loop(servicer.open), pb.OpenRequest.FromString, plain),
        "Join": unary(on_loop(servicer.join), pb.JoinRequest.FromString, plain),
        "Commit": unary(on_loop(servicer.commit), pb.CommitRequest.FromString, plain),
        "Status": unary(on_loop(servicer.status), pb.StatusRequest.FromString, plain),
        "Upload": grpc.stream_unary_rpc_method_handler(upload, None, plain),
        "Fetch": grpc.unary_stream_rpc_method_handler(
            from_loop(servicer.fetch), pb.FetchRequest.FromString, encode_chunk
        ),
        "Watch": grpc.unary_stream_rpc_method_handler(from_loop(servicer.watch), pb.WatchRequest.FromString, plain),
    }
    server = grpc.server(ThreadPoolExecutor(8), options=BULK_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    _threaded_servers.append(server)
    return int(port)


# A server that nothing refers to ends.
_threaded_servers: list[grpc.Server] = []


# --- the rank's process


@dataclass(frozen=True)
class Timing:
    """One transfer: wall seconds, and CPU seconds of the rank's process and of the service's."""

    wall_s: float
    rank_cpu_s: float
    service_cpu_s: float


class Stopwatch:
    """Times transfers.

    Args:
        service: The other process.
    """

    def __init__(self, service: psutil.Process) -> None:
        self._service = service

    def _service_cpu_s(self) -> float:
        times = self._service.cpu_times()
        return float(times.user + times.system)

    def time(self, transfer: Callable[[], object]) -> Timing:
        wall_s, rank_s, service_s = time.perf_counter(), time.process_time(), self._service_cpu_s()
        transfer()
        return Timing(time.perf_counter() - wall_s, time.process_time() - rank_s, self._service_cpu_s() - service_s)


def transfer(case: Case, port: int, peer_port: int, service_pid: int) -> dict[str, Any]:
    """Alternates both transports and returns medians."""
    chunk_bytes = case.chunk_kib << 10
    manifest = manifest_of(case)
    shards = [ShardSpec(index, 0, spec.numel) for index, spec in enumerate(manifest.parameters)]
    staged, prediction = SharedBuffer("staging", case.num_bytes), SharedBuffer("prediction", case.num_bytes)
    np.frombuffer(staged.view, np.float32)[:] = np.random.default_rng(0).standard_normal(case.num_bytes // 4)
    peer = TcpClient(peer_port, chunk_bytes)
    client = NowcastClient(
        ClientSettings(
            endpoint=f"127.0.0.1:{port}",
            token_file=None,
            tls_ca=None,
            connect_s=10.0,
            chunk_s=60.0,
            stream_s=200.0,
            channels=case.channels,
        ),
        (staged.descriptor, prediction.descriptor) if case.shared else (),
    )
    client.act_for("the benchmark's secret")
    client.wait_reachable()
    # One session to upload to and one that has a prediction.
    for session_id, period_steps in (("up", 1_000_000), ("down", CONTEXT_LEN)):
        fields = {
            "session_id": session_id,
            "run_id": session_id,
            "world_size": 1,
            "schema_hash": manifest.schema_hash,
            "context_len": CONTEXT_LEN,
            "snapshot_interval_steps": 1,
            "period_steps": period_steps,
            "predictor": "copy",
            "horizon": {},
            "aliases": {},
        }
        client.open(open_request(fields, [(spec.fqn, spec.shape) for spec in manifest.parameters], "{}"))
        client.join(session_id, 0, shards, shards)
        assert client.is_sharing == case.shared

    def send(session_id: str, step: int) -> None:
        key = pb.ChunkKey(session_id=session_id, rank=0, id=step)
        upload = Upload(
            key,
            len(staged.view),
            lambda start, length: staged.view[start : start + length],
            shared_buffer=0 if case.shared else None,
        )
        upload.fill(client.chunk_bytes)
        client.upload(upload)
        client.commit(upload, Snapshot(slot=0, step=step, epoch=0))

    for step in range(1, CONTEXT_LEN + 1):
        send("down", step)
    published = next(iter(client.watch("down", 0)))
    assert published.WhichOneof("event") == "published", published
    steps = iter(range(1, 1_000_000))

    def upload() -> None:
        send("up", next(steps))

    def download() -> None:
        client.fetch(client.new_download(pb.ChunkKey(session_id="down", rank=0, id=1), prediction.view))

    ours, raw = {"upload": upload, "download": download}, {}
    raw = {"upload": lambda: peer.upload(staged.view), "download": lambda: peer.download(prediction.view)}
    watch = Stopwatch(psutil.Process(service_pid))
    timings: dict[tuple[str, str], list[Timing]] = {}
    for repetition in range(NUM_WARM_UPS + case.repetitions):
        for name in ours:
            for kind, work in (("ours", ours[name]), ("peer", raw[name])):
                timing = watch.time(work)
                if repetition >= NUM_WARM_UPS:
                    timings.setdefault((name, kind), []).append(timing)
            assert bytes(prediction.view[-4096:]) == bytes(staged.view[-4096:]) or name == "upload"
    client.close()
    return _summary(case, timings)


def _summary(case: Case, timings: dict[tuple[str, str], list[Timing]]) -> dict[str, Any]:
    gigabytes = case.num_bytes / 1e9
    result: dict[str, Any] = asdict(case)
    for name in ("upload", "download"):
        ours, peer = timings[name, "ours"], timings[name, "peer"]
        ratios = [b.wall_s / a.wall_s for a, b in zip(ours, peer, strict=True)]
        result[name] = {
            "share_of_peer": round(statistics.median(ratios), 3),
            "share_min": round(min(ratios), 3),
            "share_max": round(max(ratios), 3),
            **{
                f"{kind}_{key}": round(statistics.median(values), 3)
                for kind, items in (("ours", ours), ("peer", peer))
                for key, values in (
                    ("gb_per_s", [gigabytes / item.wall_s for item in items]),
                    ("rank_cpu_s_per_gb", [item.rank_cpu_s / gigabytes for item in items]),
                    ("service_cpu_s_per_gb", [item.service_cpu_s / gigabytes for item in items]),
                )
            },
        }
    result["rank_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return result


# --- both


def run_case(case: Case, folder: Path) -> dict[str, Any]:
    """Runs the two processes."""
    spec = json.dumps(asdict(case))
    environment = courier_environment()
    command = [sys.executable, "-m", "benchmarks.bench_transport", "--case", spec]
    with tempfile.TemporaryDirectory(dir=folder) as vectors:
        serving = [*command, "--role", "service", "--folder", vectors]
        with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True, env=environment) as service:
            try:
                assert service.stdout is not None
                _, port, peer_port = json.loads(service.stdout.readline())
                ranking = [*command, "--role", "rank", "--ports", str(port), str(peer_port), str(service.pid)]
                output = subprocess.run(ranking, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
                peak_mib = psutil.Process(service.pid).memory_full_info().uss >> 20
            finally:
                service.kill()
    return {**json.loads(output), "service_private_mib": peak_mib}


def cases(arguments: argparse.Namespace) -> list[Case]:
    """What the command line asks for."""
    size = {"num_mib": arguments.mib, "repetitions": arguments.repetitions}
    if arguments.quick:
        return [Case(num_mib=32, repetitions=2, shared=shared) for shared in (False, True)]
    if not arguments.sweep:
        return [
            Case(
                **size,
                chunk_kib=arguments.chunk_kib,
                channels=arguments.channels,
                server=arguments.server,
                shared=arguments.shared,
            )
        ]
    return [
        *(Case(**size, chunk_kib=chunk_kib) for chunk_kib in (256, 512, 1024, 2048, 3840)),
        *(Case(**size, channels=channels) for channels in (2, 4)),
        Case(**size, shared=True),
        *(Case(**size, channels=channels, server="sync") for channels in (1, 2)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="size of the rank's buffer (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--chunk-kib", type=int, default=1024)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--server", choices=("aio", "sync"), default="aio")
    parser.add_argument("--shared", action="store_true", help="through memory that both sides have mapped")
    parser.add_argument("--sweep", action="store_true", help="chunk sizes, channels and servers, one after another")
    parser.add_argument("--quick", action="store_true", help="32 MiB, twice: does it run")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="for the service's vectors")
    parser.add_argument("--role", choices=("service", "rank"), help=argparse.SUPPRESS)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--ports", nargs=3, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "service":
        serve(Case(**json.loads(arguments.case)), arguments.folder)
    elif arguments.role == "rank":
        print(json.dumps(transfer(Case(**json.loads(arguments.case)), *arguments.ports)))
    else:
        print(json.dumps({"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}))
        for case in cases(arguments):
            print(json.dumps(run_case(case, arguments.folder)), flush=True)


if __name__ == "__main__":
    main()
