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
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History, check_history
from sidecast.predictors.passes import Found, PartContext, PassPlan, PassPredictor, divide_parts, run_pass


@dataclass(frozen=True, kw_only=True)
class HistoryFiles:
    """A history in files that every worker of the pool can map.

    Attributes:
        manifest: The model.
        paths: One raw parameter vector each, newest last.
        dtype: Of their elements.
    """

    manifest: ModelManifest
    paths: tuple[Path, ...]
    dtype: torch.dtype = torch.float32

    def open(self) -> History:
        """Maps the files; nothing is read yet."""
        return History(self.manifest, [map_vector(path, self.manifest, self.dtype) for path in self.paths])


def map_vector(path: Path, manifest: ModelManifest, dtype: torch.dtype, *, writable: bool = False) -> Tensor:
    """Maps a file of one raw parameter vector.

    Raises:
        ConfigError: The file's size is not that of the model's vector.
    """
    expected_bytes = manifest.num_elements * dtype.itemsize
    if path.stat().st_size != expected_bytes:
        raise ConfigError(
            f"{path} has {path.stat().st_size} bytes; {manifest.num_elements} {dtype} need {expected_bytes}"
        )
    return torch.from_file(str(path), shared=writable, size=manifest.num_elements, dtype=dtype)


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
        with out_path.open("wb") as file:
            file.truncate(files.manifest.num_elements * torch.float32.itemsize)
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


def _total(sums: Sequence[Tensor]) -> Tensor:
    # Copied, because Ray's objects are read-only, and added in the order of the workers.
    total = sums[0].clone()
    for part in sums[1:]:
        total += part
    return total
