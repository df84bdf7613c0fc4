"""Trains the models of sources on the farm, and keeps their states.

Shape suffixes: N snapshots, P elements of the parameter vector, M runs of one source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sidecast.atomic_files import replacing
from sidecast.errors import ConfigError
from sidecast.evaluation.corpora import Corpus, load_corpus
from sidecast.evaluation.farm import GroupRun
from sidecast.evaluation.gradients import Engine
from sidecast.evaluation.native.llama_gradients import native_gradients
from sidecast.metatraining.sources import Source

_METADATA_KEY = "sidecast.trajectory"
_ENGINE = Engine()

Report = Callable[[str], None]
"""Called with lines that say how far the work is."""


@dataclass(frozen=True)
class Trajectory:
    """The states of one run.

    Attributes:
        source: Where it comes from.
        lr: The run's peak learning rate.
        states_NP: From the initial state on, ``source.snapshot_steps`` apart, fp16.
    """

    source: Source
    lr: float
    states_NP: Tensor


class TrajectoryStore:
    """A folder of trajectories and of the texts that they were trained on; one process at a time may write to it.

    Args:
        folder: Is made when something is written.
        max_bytes: What all trajectories may take.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    @property
    def native(self) -> Path:
        """Where compiled arithmetic is kept."""
        return self._folder / "native"

    def corpus(self, source: Source) -> Corpus:
        """The text of a source, read once and kept."""
        return load_corpus(source.task.corpus, self._folder / "corpora")

    def ensure(self, sources: Sequence[Source], report: Report) -> None:
        """Trains what is not there yet; a source that was interrupted begins anew, the others are left alone.

        Raises:
            ConfigError: All together would take more than is allowed, or a run diverged.
        """
        num_bytes = sum(source.num_bytes for source in sources)
        if num_bytes > self._max_bytes:
            raise ConfigError(f"the trajectories take {num_bytes:,} bytes; allowed are {self._max_bytes:,} (--max-gib)")
        missing = [source for source in sources if not self._is_there(source)]
        for number, source in enumerate(missing, 1):
            report(
                f"trajectories {number} of {len(missing)}: {source.name}, {len(source.lrs)} runs of "
                f"{source.num_steps} steps"
            )
            self._write(source, self._run(source))

    def load(self, source: Source) -> list[Trajectory]:
        """The runs of a source, mapped from its file.

        Raises:
            ConfigError: They are not there.
        """
        if not self._is_there(source):
            raise ConfigError(f"{self._path(source)} has no trajectories of this recipe; train them first")
        with safe_open(self._path(source), framework="pt") as file:
            return [Trajectory(source, lr, file.get_tensor(str(row))) for row, lr in enumerate(source.lrs)]

    def _run(self, source: Source) -> Tensor:
        task = source.task
        gradients = native_gradients(task.model.build(), task.sequence_length, self.native)
        run = GroupRun(task, [self.corpus(source)], source.members(), _ENGINE, gradients=gradients)
        states_MNP = torch.empty(len(source.lrs), source.num_snapshots, run.params_MP.shape[1], dtype=torch.float16)
        states_MNP[:, 0] = run.params_MP
        for snapshot in range(1, source.num_snapshots):
            run.advance(source.snapshot_steps)
            states_MNP[:, snapshot] = run.params_MP
        for lr, states_NP in zip(source.lrs, states_MNP, strict=True):
            if not states_NP.isfinite().all():
                raise ConfigError(f"the run of {source.name} with lr {lr} diverged; a nowcaster cannot learn from it")
        return states_MNP

    def _is_there(self, source: Source) -> bool:
        path = self._path(source)
        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="pt") as file:
                return (file.metadata() or {}).get(_METADATA_KEY) == self._metadata(source)
        except SafetensorError:
            return False

    def _write(self, source: Source, states_MNP: Tensor) -> None:
        path = self._path(source)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            tensors = {str(row): states_NP.contiguous() for row, states_NP in enumerate(states_MNP)}
            save_file(tensors, partial, metadata={_METADATA_KEY: self._metadata(source)})

    def _metadata(self, source: Source) -> str:
        return json.dumps({"source": source.name, "digest": source.digest(self.corpus(source).digest)})

    def _path(self, source: Source) -> Path:
        return self._folder / "trajectories" / f"{source.name}.safetensors"
