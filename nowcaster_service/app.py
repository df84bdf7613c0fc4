"""The service as Ray actors: one ingress with the gRPC server, engines with a device each. The home of ray."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
import uuid
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import grpc
import ray
from prometheus_client import CollectorRegistry

from sidecast.errors import ConfigError, SidecastError, one_line
from sidecast.nowcaster_service.access.callers import callers_of
from sidecast.nowcaster_service.access.listening import until_free
from sidecast.nowcaster_service.access.scraping import serve_metrics
from sidecast.nowcaster_service.config import ServiceConfig, host_and_port
from sidecast.nowcaster_service.engine_pool import DividedRunner
from sidecast.nowcaster_service.engines.ray_engines import SILENCE_S, WATCH_INTERVAL_S, RayEngines
from sidecast.nowcaster_service.errors import ServiceLostError
from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.nowcaster_service.nowcasting import (
    NowcastAnswer,
    Nowcasting,
    NowcastRequest,
    PredictorAnswer,
    PredictorRequest,
)
from sidecast.nowcaster_service.page.server import PageServer
from sidecast.nowcaster_service.probing.evaluation import ProbeActor
from sidecast.nowcaster_service.pushing import PushRequest
from sidecast.nowcaster_service.read_outs.folding import FoldAnswer, FoldRequest, answer_fold
from sidecast.nowcaster_service.server import create_server
from sidecast.nowcaster_service.servicer import Servicer
from sidecast.nowcaster_service.vector_store import HistoryStore
from sidecast.protos.transport import BULK_ENVIRONMENT

log = logging.getLogger(__name__)
T = TypeVar("T")

EXPIRY_INTERVAL_S = 30.0
# At a first start: Ray opens ports of its own just before, of which one may be ours.
FIRST_BIND_S = 10.0
START_TIMEOUT_S = 600.0
SAY_INTERVAL_S = 30.0
POLL_S = 0.5
# Runs whose predictors are set up at once; a slow one must not be in the others' way.
CHECK_THREADS = 8
STOP_GRACE_S = 2.0
# Ray may start the next ingress a little before the system has cleared the last one away.
LOCK_TIMEOUT_S = 10.0
# Ray's calls to the ingress (address, stop) that may wait side by side; gRPC has an event loop of its own.
INGRESS_CALLS = 4
ENGINE_NAME, PROBE_NAME = "sidecast-engine", "sidecast-probe"
# Ray's memory monitor would end the ingress, and all histories with it, when some other program fills the host.
LOCAL_RAY_ENVIRONMENT = {"RAY_memory_monitor_refresh_ms": "0"}
# Models are made of configurations that clients send: nothing that these name is to be fetched.
PROBE_ENVIRONMENT = {"HF_HUB_OFFLINE": "1"}


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
        self._life = uuid.uuid4().hex

    @ray.method(concurrency_group="life")
    def life(self) -> str:
        """Names this actor's process; another one has another name."""
        return self._life

    # In threads of their own: a run that opens must not wait for the nowcast of another, nor for another's check.
    @ray.method(concurrency_group="checks")
    def check(self, request: PredictorRequest) -> PredictorAnswer:
        return self._nowcasting.check(request)

    def predict(self, request: NowcastRequest) -> NowcastAnswer:
        return self._nowcasting.predict(request)

    # Nor must its pushes, of which each is worth little after a few steps.
    @ray.method(concurrency_group="pushes")
    def push(self, request: PushRequest) -> NowcastAnswer:
        return self._nowcasting.push(request)

    # And nobody waits for averages.
    @ray.method(concurrency_group="read_outs")
    def fold(self, request: FoldRequest) -> FoldAnswer:
        return answer_fold(request)


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
        self._store: HistoryStore | None = None
        self._page: PageServer | None = None
        # Looked up by name: a handle among the constructor's arguments would not survive a restart of this actor.
        probe = None if config.probe is None else ray.get_actor(PROBE_NAME)
        self._engines = RayEngines(ray.get_actor(ENGINE_NAME), probe)
        threading.Thread(target=self._run, name="grpc", daemon=True).start()

    def address(self) -> str:
        """Where the gRPC server listens; waits until it does."""
        return host_and_port(self._config.host, self._started.result())

    def health(self) -> str:
        """Why the service is of no use now; empty if it is."""
        # Without waiting: calls that wait would leave no thread for the one that stops it.
        return self._engines.fault() if self._server is not None else f"it does not listen at port {self._config.port}"

    def stop(self) -> None:
        """Ends the gRPC server, letting calls in flight finish, and removes the histories."""
        server = self._server
        if self._page is not None:
            self._page.close()
        if server is not None:
            asyncio.run_coroutine_threadsafe(server.stop(STOP_GRACE_S), self._loop).result()
        if self._store is not None:
            self._store.close()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            servicer = self._loop.run_until_complete(self._start())
        except BaseException as error:
            # Nobody asks for the address of one that Ray has started again.
            log.error("the gRPC server cannot start: %s", error)
            self._started.set_exception(error)
            return
        tasks = [self._loop.create_task(work) for work in (_expire_for_ever(servicer), self._engines.watch())]
        self._loop.run_forever()
        del tasks

    async def _start(self) -> Servicer:
        config = self._config
        # Others may have taken the port of one that died, if only as the near end of a connection: it is waited for.
        # A first start says at once that it cannot be.
        with warnings.catch_warnings():
            # Ray's own code uses what Ray deprecates.
            warnings.simplefilter("ignore")
            is_restart = ray.get_runtime_context().was_current_actor_reconstructed
        bind = partial(until_free, deadline_s=math.inf if is_restart else time.monotonic() + FIRST_BIND_S)
        metrics = ServiceMetrics(CollectorRegistry())
        # One thread: what is removed is removed in order, and all runs go on meanwhile.
        remover = ThreadPoolExecutor(1, thread_name_prefix="remover")
        self._store = store = HistoryStore(
            config.history_dir, config.history_budget_bytes, LOCK_TIMEOUT_S, remove=remover.submit
        )
        servicer = Servicer(config, store, self._engines, metrics, version=version("sidecast"))
        callers = await bind(lambda: callers_of(config))
        metrics_port = config.metrics_port
        if metrics_port is not None:
            visible_runs = servicer.sessions.owners.visible_runs
            await bind(lambda: serve_metrics(config, metrics.registry, callers, visible_runs, metrics_port))
        page_port = config.page_port
        if page_port is not None:
            self._page = await bind(lambda: PageServer(servicer, callers, page_port))
        server, port = await bind(lambda: create_server(servicer, callers, config.port))
        servicer.handover.start()
        await server.start()
        self._server = server
        self._started.set_result(port)
        return servicer


async def _expire_for_ever(servicer: Servicer) -> None:
    while True:
        await asyncio.sleep(EXPIRY_INTERVAL_S)
        try:
            servicer.sessions.expire()
        except Exception:
            # The next time may be better, and without it no space is ever given back.
            log.exception("what has expired could not be removed")


class Application:
    """A running service. Must be ended with ``stop``.

    Args:
        config: Settings.
        ray_address: An existing Ray cluster, or None to start a local one that lives as long as this process.
        ray_dir: Where a local one has its logs and sockets, with a path that is short.
    """

    def __init__(self, config: ServiceConfig, ray_address: str | None = None, ray_dir: Path | None = None) -> None:
        self._is_own_ray = ray_address is None
        self._engines_timeout_s = config.engines_timeout_s
        if ray_address is None:
            os.environ.update(LOCAL_RAY_ENVIRONMENT)
            # Else Ray makes its workers nice by 15, and on a busy host those that answer trainers starve. Who wants
            # that starts the whole service with `nice`.
            os.environ.setdefault("RAY_worker_niceness", "0")
            _start_ray(
                address="local",
                num_cpus=config.num_engines,
                include_dashboard=False,
                log_to_driver=True,
                logging_level=logging.WARNING,
                _node_ip_address="127.0.0.1",
                _temp_dir=None if ray_dir is None else str(ray_dir),
            )
            _require_gpus(config, ray.cluster_resources().get("GPU", 0))
        else:
            _start_ray(address=ray_address, logging_level=logging.WARNING)
        # The engine itself only leads where workers share each nowcast.
        works = config.num_engines == 1
        # Ray's types know no options of actor classes.
        actor: Any = ray.remote
        engine = actor(
            num_cpus=int(works),
            num_gpus=config.engine_gpus if works else 0,
            max_restarts=-1,
            concurrency_groups={"checks": CHECK_THREADS, "pushes": 1, "read_outs": 1, "life": 1},
        )(EngineActor)
        ingress = actor(num_cpus=0, max_restarts=-1, runtime_env={"env_vars": BULK_ENVIRONMENT})(IngressActor)
        self._engine = engine.options(name=ENGINE_NAME).remote(config)
        if config.probe is not None:
            probe = actor(num_cpus=0, num_gpus=config.probe_gpus, max_restarts=-1)(ProbeActor)
            environment = {"env_vars": PROBE_ENVIRONMENT}
            self._probe = probe.options(name=PROBE_NAME, runtime_env=environment).remote(config)
        # Ray's types do not follow an actor class made by a call.
        self._ingress: Any = ingress.options(max_concurrency=INGRESS_CALLS).remote(config)

    def address(self, stop: threading.Event) -> str | None:
        """Where the gRPC server listens; waits until it does.

        Args:
            stop: Ends the waiting.

        Returns:
            HOST:PORT; None once ``stop`` is set.

        Raises:
            SidecastError: It cannot listen there.
            ServiceLostError: It has not begun to in ``START_TIMEOUT_S``.
        """
        began_s = time.monotonic()
        said_s = began_s
        address = self._ingress.address.remote()
        while not stop.is_set():
            # In short waits: a signal's handler runs between them.
            if ray.wait([address], timeout=POLL_S)[0]:
                try:
                    return str(ray.get(address))
                except ray.exceptions.RayTaskError as error:
                    # Its own text is the actor's traceback; what the actor refused is one line.
                    raise error.cause from error
                except ray.exceptions.RayError:
                    # It died meanwhile, and Ray starts it again.
                    stop.wait(POLL_S)
                    address = self._ingress.address.remote()
            now_s = time.monotonic()
            if now_s - began_s > START_TIMEOUT_S:
                raise ServiceLostError(f"the service's process has not started within {START_TIMEOUT_S:g} s")
            if now_s - said_s > SAY_INTERVAL_S:
                said_s = now_s
                log.warning("still waiting for Ray to start the service's process, for %.0f s", now_s - began_s)
        return None

    def watch(self, stop: threading.Event) -> None:
        """Returns once ``stop`` is set.

        Raises:
            ServiceLostError: The service cannot be reached, or has no engines, and has not come back.
        """
        well_s = time.monotonic()
        while not stop.wait(WATCH_INTERVAL_S):
            try:
                fault = str(ray.get(self._ingress.health.remote(), timeout=SILENCE_S))
                # The nodes of somebody else's cluster come and go; sessions are kept for them.
                is_lost = bool(fault) and self._is_own_ray
            except (ray.exceptions.RayError, SidecastError) as error:
                fault, is_lost = f"the service's process is gone: {one_line(error)}", True
            if not is_lost:
                well_s = time.monotonic()
            elif time.monotonic() - well_s > self._engines_timeout_s:
                raise ServiceLostError(f"{fault}, and it has not come back within {self._engines_timeout_s:g} s")

    def stop(self) -> None:
        """Ends the service and, if it was started here, Ray."""
        try:
            ray.get(self._ingress.stop.remote(), timeout=2 * STOP_GRACE_S)
        except ray.exceptions.RayError as error:
            # It is ending anyhow.
            log.warning("the service's process did not end in order: %s", one_line(error))
        finally:
            ray.shutdown()


def _start_ray(**settings: Any) -> None:
    try:
        ray.init(**settings)
    except Exception as error:
        # Ray raises what it likes, and its text is long.
        raise ServiceLostError(f"Ray does not start: {one_line(error)}") from error


def _require_gpus(config: ServiceConfig, num_found: float) -> None:
    # An engine without its GPU would wait for ever.
    num_wanted = config.num_engines * config.engine_gpus + config.probe_gpus
    if num_wanted > num_found:
        ray.shutdown()
        probe = f", and a probe with {config.probe_gpus:g}," if config.probe_gpus else ""
        raise ConfigError(
            f"{config.num_engines} engines with {config.engine_gpus:g} GPUs each{probe} need {num_wanted:g} GPUs; this "
            f"machine has {num_found:g} (--engines, --engine-gpus, --device, --probe-gpus)"
        )
