"""The service as Ray actors: one ingress with the gRPC server, engines with a device each. The home of ray."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from concurrent.futures import Future
from importlib.metadata import version
from typing import Any

import grpc
import ray
from prometheus_client import CollectorRegistry, start_http_server

from sidecast.errors import ConfigError
from sidecast.nowcaster_service.config import ServiceConfig
from sidecast.nowcaster_service.engine_pool import DividedRunner
from sidecast.nowcaster_service.errors import AddressError
from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.nowcaster_service.nowcasting import (
    NowcastAnswer,
    Nowcasting,
    NowcastRequest,
    PredictorAnswer,
    PredictorRequest,
)
from sidecast.nowcaster_service.pushing import PushRequest
from sidecast.nowcaster_service.server import create_server
from sidecast.nowcaster_service.servicer import Servicer
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.protos.transport import BULK_ENVIRONMENT

log = logging.getLogger(__name__)

EXPIRY_INTERVAL_S = 30.0
STOP_GRACE_S = 2.0
# Ray may start the next ingress a little before the system has cleared the last one away.
LOCK_TIMEOUT_S = 10.0
# Ray's calls to the ingress (address, stop) that may wait side by side; gRPC has an event loop of its own.
INGRESS_CALLS = 4
ENGINE_NAME = "sidecast-engine"
# Ray's memory monitor would end the ingress, and all histories with it, when some other program fills the host.
LOCAL_RAY_ENVIRONMENT = {"RAY_memory_monitor_refresh_ms": "0"}


class EngineActor:
    """Runs predictors in a process of its own, or divides their work among several."""

    def __init__(self, config: ServiceConfig) -> None:
        import torch

        torch.set_num_threads(config.engine_threads)
        runner = (
            None
            if config.num_engines == 1
            else DividedRunner(config.num_engines, config.engine_threads, config.engine_gpus)
        )
        self._nowcasting = Nowcasting(config.weights, device=config.device, runner=runner)

    # In a thread of its own: a run that opens must not wait for the nowcast of another.
    @ray.method(concurrency_group="checks")
    def check(self, request: PredictorRequest) -> PredictorAnswer:
        return self._nowcasting.check(request)

    def predict(self, request: NowcastRequest) -> NowcastAnswer:
        return self._nowcasting.predict(request)

    # Nor must its pushes, of which each is worth little after a few steps.
    @ray.method(concurrency_group="pushes")
    def push(self, request: PushRequest) -> NowcastAnswer:
        return self._nowcasting.push(request)


class RayEngines:
    """The engine actor as the servicer sees it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def check(self, request: PredictorRequest) -> PredictorAnswer:
        return await self._actor.check.remote(request)

    async def predict(self, request: NowcastRequest) -> NowcastAnswer:
        return await self._actor.predict.remote(request)

    async def push(self, request: PushRequest) -> NowcastAnswer:
        return await self._actor.push.remote(request)


class IngressActor:
    """Owns the sessions and the gRPC server, on an event loop in a thread of its own.

    The server starts in the constructor, so that Ray's restart of a dead ingress brings it back on its port.
    """

    def __init__(self, config: ServiceConfig) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        self._config = config
        self._started: Future[int] = Future()
        self._loop = asyncio.new_event_loop()
        self._server: grpc.aio.Server | None = None
        # Looked up by name: a handle among the constructor's arguments would not survive a restart of this actor.
        engines = RayEngines(ray.get_actor(ENGINE_NAME))
        threading.Thread(target=self._run, args=(engines,), name="grpc", daemon=True).start()

    def address(self) -> str:
        """Where the gRPC server listens; waits until it does."""
        return f"{self._config.host}:{self._started.result()}"

    def stop(self) -> None:
        """Ends the gRPC server, letting calls in flight finish."""
        server = self._server
        if server is not None:
            asyncio.run_coroutine_threadsafe(server.stop(STOP_GRACE_S), self._loop).result()

    def _run(self, engines: RayEngines) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            servicer = self._loop.run_until_complete(self._start(engines))
        except BaseException as error:
            # Nobody asks for the address of one that Ray has started again.
            log.error("the gRPC server cannot start: %s", error)
            self._started.set_exception(error)
            return
        self._loop.create_task(_expire_for_ever(servicer))
        self._loop.run_forever()

    async def _start(self, engines: RayEngines) -> Servicer:
        config = self._config
        metrics = ServiceMetrics(CollectorRegistry())
        if config.metrics_port is not None:
            try:
                start_http_server(config.metrics_port, addr=config.host, registry=metrics.registry)
            except OSError as error:
                raise AddressError(
                    f"cannot serve metrics at {config.host}:{config.metrics_port}: {error.strerror} (--metrics-port)"
                ) from error
        store = HistoryStore(config.history_dir, config.history_budget_bytes, LOCK_TIMEOUT_S)
        servicer = Servicer(config, store, engines, metrics, version=version("sidecast"))
        server, port = create_server(servicer, config.port)
        servicer.handover.start()
        await server.start()
        self._server = server
        self._started.set_result(port)
        return servicer


async def _expire_for_ever(servicer: Servicer) -> None:
    while True:
        await asyncio.sleep(EXPIRY_INTERVAL_S)
        servicer.sessions.expire()


class Application:
    """A running service. Must be ended with ``stop``.

    Args:
        config: Settings.
        ray_address: An existing Ray cluster, or None to start a local one that lives as long as this process.
    """

    def __init__(self, config: ServiceConfig, ray_address: str | None = None) -> None:
        if ray_address is None:
            os.environ.update(LOCAL_RAY_ENVIRONMENT)
            ray.init(
                address="local",
                num_cpus=config.num_engines,
                include_dashboard=False,
                log_to_driver=True,
                logging_level=logging.WARNING,
                _node_ip_address="127.0.0.1",
            )
            _require_gpus(config, ray.cluster_resources().get("GPU", 0))
        else:
            ray.init(address=ray_address, logging_level=logging.WARNING)
        # The engine itself only leads where workers share each nowcast.
        works = config.num_engines == 1
        # Ray's types know no options of actor classes.
        actor: Any = ray.remote
        engine = actor(
            num_cpus=int(works),
            num_gpus=config.engine_gpus if works else 0,
            max_restarts=-1,
            concurrency_groups={"checks": 1, "pushes": 1},
        )(EngineActor)
        ingress = actor(num_cpus=0, max_restarts=-1, runtime_env={"env_vars": BULK_ENVIRONMENT})(IngressActor)
        self._engine = engine.options(name=ENGINE_NAME).remote(config)
        # Ray's types do not follow an actor class made by a call.
        self._ingress: Any = ingress.options(max_concurrency=INGRESS_CALLS).remote(config)

    def address(self) -> str:
        """Where the gRPC server listens; waits until it does.

        Raises:
            SidecastError: It cannot listen there.
        """
        try:
            return str(ray.get(self._ingress.address.remote()))
        except ray.exceptions.RayTaskError as error:
            # Its own text is the actor's traceback; what the actor refused is one line.
            raise error.cause from error

    def stop(self) -> None:
        """Ends the service and, if it was started here, Ray."""
        try:
            ray.get(self._ingress.stop.remote(), timeout=2 * STOP_GRACE_S)
        finally:
            ray.shutdown()


def _require_gpus(config: ServiceConfig, num_found: float) -> None:
    # An engine without its GPU would wait for ever.
    num_wanted = config.num_engines * config.engine_gpus
    if num_wanted > num_found:
        ray.shutdown()
        raise ConfigError(
            f"{config.num_engines} engines with {config.engine_gpus:g} GPUs each need {num_wanted:g} GPUs; this "
            f"machine has {num_found:g} (--engines, --engine-gpus, --device)"
        )
