"""A pool of Ray actors that share one nowcast: each owns some parts of the graph, node sums meet between passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.nowcaster_service.nowcasting import run_here
from sidecast.nowcaster_service.vector_files import HistoryFiles, map_vector
from sidecast.predictors.base import Predictor, check_history
from sidecast.predictors.passes import Found, PartContext, PassPlan, PassPredictor, divide_parts, run_pass


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
        self._task: Task | None = None

    def load(self, predictor: PassPredictor) -> None:
        """Takes another predictor."""
        self._predictor = predictor
        self._task = None

    def begin(self, task: Task) -> None:
        """Opens a history and finds this worker's share of the work."""
        plan = self._predictor.plan(task.files.manifest, task.horizon_intervals)
        self._plan = PassPlan(divide_parts(plan.parts, task.num_workers)[task.worker], plan.passes)
        self._history = task.files.open()
        self._out = map_vector(task.out_path, task.files.manifest, torch.float32, writable=True)
        self._task = task

    @torch.inference_mode()
    def run(self, pass_index: int, found: Found) -> Tensor | None:
        """One pass over this worker's parts; returns their sums."""
        assert self._task is not None, "begin comes first"
        context = PartContext(self._history.manifest, self._history.states, found, self._out)
        return run_pass(self._plan.passes[pass_index], self._plan.parts, context, self._num_threads)


class EnginePool:
    """Workers that divide every nowcast among themselves.

    The result does not depend on their number beyond round-off.

    Args:
        predictor: What they run.
        num_workers: Actors.
        num_threads: Threads of each.
        num_cpus: CPUs that Ray reserves for each.
    """

    def __init__(
        self, predictor: PassPredictor, num_workers: int, *, num_threads: int = 1, num_cpus: float = 1
    ) -> None:
        if num_workers < 1:
            raise ConfigError(f"num_workers is {num_workers}; it must be at least 1")
        self._predictor = predictor
        # Never restarted: a new actor would not know its task, and the caller can repeat the nowcast.
        actor = ray.remote(PassWorker).options(num_cpus=num_cpus, max_restarts=0)
        self._workers: list[Any] = [actor.remote(predictor, num_threads) for _ in range(num_workers)]

    def load(self, predictor: PassPredictor) -> None:
        """Gives all workers another predictor."""
        self._predictor = predictor
        shared = ray.put(predictor)
        ray.get([worker.load.remote(shared) for worker in self._workers])

    def predict(self, files: HistoryFiles, horizon_intervals: int, out_path: Path) -> None:
        """Writes the predicted change, an fp32 parameter vector, to a file.

        Raises:
            ConfigError: The predictor cannot work on this history, model or horizon.
        """
        history = files.open()
        check_history(self._predictor, history, horizon_intervals)
        plan = self._predictor.plan(files.manifest, horizon_intervals)
        num_bytes = files.manifest.num_elements * torch.float32.itemsize
        # The service's file is there already, allocated and mapped by others, who would lose it if it were emptied.
        if not out_path.exists() or out_path.stat().st_size != num_bytes:
            with out_path.open("wb") as file:
                file.truncate(num_bytes)
        out = map_vector(out_path, files.manifest, torch.float32, writable=True)
        ray.get([worker.begin.remote(task) for worker, task in self._tasks(files, horizon_intervals, out_path)])
        context = PartContext(files.manifest, history.states, {}, out)
        for index, block_pass in enumerate(plan.passes):
            found = ray.put(context.found)
            sums = ray.get([worker.run.remote(index, found) for worker in self._workers])
            if sums[0] is not None:
                context = PartContext(files.manifest, history.states, block_pass.finish(_total(sums), context), out)

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
        num_workers: Actors of the pool, started with the first nowcast.
        num_threads: Threads of each.
    """

    def __init__(self, num_workers: int, num_threads: int) -> None:
        self._num_workers = num_workers
        self._num_threads = num_threads
        self._pool: EnginePool | None = None
        self._loaded: Predictor | None = None

    def __call__(self, predictor: Predictor, files: HistoryFiles, horizon_intervals: int, delta_path: Path) -> None:
        if not isinstance(predictor, PassPredictor):
            run_here(predictor, files, horizon_intervals, delta_path)
            return
        if self._pool is None:
            self._pool = EnginePool(predictor, self._num_workers, num_threads=self._num_threads)
        elif predictor is not self._loaded:
            self._pool.load(predictor)
        self._loaded = predictor
        try:
            self._pool.predict(files, horizon_intervals, delta_path)
        except ray.exceptions.RayActorError:
            # A worker died: this nowcast is lost, the next one gets a whole pool.
            self._pool.close()
            self._pool = None
            raise
        except ray.exceptions.RayTaskError as error:
            # Its own text is the worker's traceback; what the worker refused is one line.
            raise error.cause from error


def _total(sums: Sequence[Tensor]) -> Tensor:
    # Copied, because Ray's objects are read-only, and added in the order of the workers.
    total = sums[0].clone()
    for part in sums[1:]:
        total += part
    return total
