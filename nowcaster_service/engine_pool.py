"""A pool of Ray actors that share one nowcast: each owns some parts of the model, their sums meet between passes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.nowcasting import LocalRunner
from sidecast.nowcaster_service.vector_files import HistoryFiles, map_vector
from sidecast.predictors.base import Predictor, check_history
from sidecast.predictors.passes import PartContext, PassPredictor, divide_parts, run_pass


@dataclass(frozen=True, kw_only=True)
class Task:
    """One nowcast of a pool.

    Attributes:
        files: The history.
        horizon_intervals: How far ahead.
        out_path: File of the predicted change, fp32.
        worker: Number of this worker.
        num_workers: Workers that share the nowcast.
    """

    files: HistoryFiles
    horizon_intervals: int
    out_path: Path
    worker: int
    num_workers: int


class PassWorker:
    """Runs the passes of a plan over its own share of the parts.

    Args:
        predictor: Makes the plan, the same on every worker.
        num_threads: Threads of this worker.
    """

    def __init__(self, predictor: PassPredictor, num_threads: int) -> None:
        self._predictor = predictor
        self._num_threads = num_threads
        self._sums_device = torch.device("cpu")

    def load(self, predictor: PassPredictor) -> None:
        """Takes another predictor."""
        self._predictor = predictor

    def prepare(self, manifest: ModelManifest, horizon_intervals: int) -> None:
        """Builds what depends on the model alone."""
        LocalRunner().prepare(self._predictor, manifest, horizon_intervals)

    def begin(self, task: Task) -> int:
        """Opens a history and finds this worker's share of the work; returns the number of passes."""
        history = task.files.open()
        check_history(self._predictor, history, task.horizon_intervals)
        plan = self._predictor.plan(task.files.manifest, task.horizon_intervals)
        self._plan = replace(plan, parts=divide_parts(plan.parts, task.num_workers)[task.worker])
        out = map_vector(task.out_path, task.files.manifest, torch.float32, writable=True)
        self._context = PartContext(task.files.manifest, history.states, {}, out)
        return len(plan.passes)

    @torch.inference_mode()
    def run(self, pass_index: int, total: Tensor | None) -> Tensor | None:
        """One pass over this worker's parts.

        Args:
            pass_index: Which one.
            total: What all workers found in the pass before; None if that had no sums.

        Returns:
            The sums of these parts; None if the pass has none.
        """
        if total is not None:
            # Every worker draws the same conclusions, on its own device. Copied, because Ray's objects are read-only.
            sums = total.clone().to(self._sums_device)
            found = self._plan.passes[pass_index - 1].finish(sums, self._context)
            self._context = replace(self._context, found=found)
        num_threads = self._plan.num_threads(self._num_threads)
        sums_here = run_pass(self._plan.passes[pass_index], self._plan.parts, self._context, num_threads)
        if sums_here is None:
            return None
        self._sums_device = sums_here.device
        return sums_here.cpu()

    def end(self) -> None:
        """Lets go of the history and of everything found in it."""
        del self._context


class EnginePool:
    """Workers that divide every nowcast among themselves.

    The result does not depend on their number beyond round-off.

    Args:
        predictor: What they run.
        num_workers: Actors.
        num_threads: Threads of each.
        num_cpus: CPUs that Ray reserves for each.
        num_gpus: GPUs that Ray reserves for each.
    """

    def __init__(
        self,
        predictor: PassPredictor,
        num_workers: int,
        *,
        num_threads: int = 1,
        num_cpus: float = 1,
        num_gpus: float = 0,
    ) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers is {num_workers}; it must be at least 1")
        # Never restarted: a new actor would not know its task, and the caller can repeat the nowcast.
        actor = ray.remote(PassWorker).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0)
        self._workers: list[Any] = [actor.remote(predictor, num_threads) for _ in range(num_workers)]

    def load(self, predictor: PassPredictor) -> None:
        """Gives all workers another predictor."""
        shared = ray.put(predictor)
        ray.get([worker.load.remote(shared) for worker in self._workers])

    def prepare(self, manifest: ModelManifest, horizon_intervals: int) -> None:
        """Lets all workers build what depends on the model alone.

        Raises:
            ConfigError: The predictor cannot work where they are, on this model or so far ahead.
        """
        shared = ray.put(manifest)
        ray.get([worker.prepare.remote(shared, horizon_intervals) for worker in self._workers])

    def predict(self, files: HistoryFiles, horizon_intervals: int, out_path: Path) -> None:
        """Writes the predicted change, an fp32 parameter vector, to a file.

        Raises:
            ConfigError: The predictor cannot work on this history, model or horizon.
        """
        num_bytes = files.manifest.num_elements * torch.float32.itemsize
        # The service's file is there already, allocated and mapped by others, who would lose it if it were emptied.
        if not out_path.exists() or out_path.stat().st_size != num_bytes:
            with out_path.open("wb") as file:
                file.truncate(num_bytes)
        tasks = self._tasks(files, horizon_intervals, out_path)
        num_passes, *_ = ray.get([worker.begin.remote(task) for worker, task in tasks])
        total = None
        for index in range(num_passes):
            shared = ray.put(total)
            total = total_of(ray.get([worker.run.remote(index, shared) for worker in self._workers]))
        ray.get([worker.end.remote() for worker in self._workers])

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            ray.kill(worker)

    def _tasks(self, files: HistoryFiles, horizon_intervals: int, out_path: Path) -> list[tuple[Any, Task]]:
        return [
            (
                worker,
                Task(
                    files=files,
                    horizon_intervals=horizon_intervals,
                    out_path=out_path,
                    worker=index,
                    num_workers=len(self._workers),
                ),
            )
            for index, worker in enumerate(self._workers)
        ]


class DividedRunner:
    """Divides each nowcast among a pool of workers, where the predictor can be divided; runs others in this process.

    Args:
        num_workers: Actors of the pool, started for the first predictor.
        num_threads: Threads of each.
        num_gpus: GPUs of each.
    """

    def __init__(self, num_workers: int, num_threads: int, num_gpus: float = 0) -> None:
        self._num_workers = num_workers
        self._num_threads = num_threads
        self._num_gpus = num_gpus
        self._local = LocalRunner()
        self._pool: EnginePool | None = None
        self._loaded: Predictor | None = None
        # Runs are checked in another thread than nowcasts are made in; the pool serves one of the two at a time.
        self._pool_lock = threading.Lock()

    def prepare(self, predictor: Predictor, manifest: ModelManifest, horizon_intervals: int) -> None:
        # A run that opens does not wait for another's nowcast: this process can check as well, if it has the device.
        if isinstance(predictor, PassPredictor) and self._pool_lock.acquire(blocking=self._num_gpus > 0):
            try:
                with self._pool_of(predictor) as pool:
                    pool.prepare(manifest, horizon_intervals)
            finally:
                self._pool_lock.release()
        else:
            self._local.prepare(predictor, manifest, horizon_intervals)

    def predict(self, predictor: Predictor, files: HistoryFiles, horizon_intervals: int, delta_path: Path) -> None:
        if not isinstance(predictor, PassPredictor):
            self._local.predict(predictor, files, horizon_intervals, delta_path)
            return
        with self._pool_lock, self._pool_of(predictor) as pool:
            pool.predict(files, horizon_intervals, delta_path)

    def close(self) -> None:
        """Ends the pool."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    @contextmanager
    def _pool_of(self, predictor: PassPredictor) -> Iterator[EnginePool]:
        """The pool with this predictor; what goes wrong in it is told as if it had happened here."""
        try:
            if self._pool is None:
                self._pool = EnginePool(
                    predictor, self._num_workers, num_threads=self._num_threads, num_gpus=self._num_gpus
                )
            elif predictor is not self._loaded:
                self._pool.load(predictor)
            self._loaded = predictor
            yield self._pool
        except ray.exceptions.RayActorError:
            # A worker died: this nowcast is lost, the next one gets a whole pool.
            self.close()
            raise
        except ray.exceptions.RayTaskError as error:
            # Its own text is the worker's traceback; what the worker refused is one line.
            raise error.cause from error


def total_of(sums: Sequence[Tensor | None]) -> Tensor | None:
    """The sums of all workers, in the order of the workers; None if the pass has none."""
    present = [part for part in sums if part is not None]
    if not present:
        return None
    # Copied, because Ray's objects are read-only.
    total = present[0].clone()
    for part in present[1:]:
        total += part
    return total
