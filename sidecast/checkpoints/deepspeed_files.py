"""Files of DeepSpeed checkpoint folders: which there are, by data-parallel rank, and what they hold."""

from __future__ import annotations

import re
from pathlib import Path

from sidecast.checkpoints.fields import Field
from sidecast.checkpoints.inert_pickle import load_inert
from sidecast.errors import ConfigError

MODEL_FILES = "*_model_states.pt"
OPTIMIZER_FILES = "*_optim_states.pt"


def ranked_files(path: Path, pattern: str) -> list[Path]:
    """The files of a kind, by data-parallel rank.

    Raises:
        ConfigError: There are none, a rank has none or two, or the model was split by tensor, pipeline or expert
            parallelism.
    """
    ranked: dict[int, Path] = {}
    for file in sorted(path.glob(pattern)):
        match = re.search(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_", file.name)
        if match is None or int(match[2]) != 0 or "expert" in file.name or file.name.startswith("expp"):
            raise ConfigError(
                f"{path} was saved with tensor, pipeline or expert parallelism ({file.name}); "
                f"only data-parallel checkpoints are supported"
            )
        rank = int(match[1] or 0)
        if rank in ranked:
            raise ConfigError(
                f"{path} holds two files of rank {rank}, {ranked[rank].name} and {file.name}; "
                f"remove the one that is left over from another run"
            )
        ranked[rank] = file
    if not ranked:
        raise ConfigError(f"{path} has no {pattern} file; every rank of the run saves one")
    return [ranked[rank] for rank in sorted(ranked)]


def check_ranks(path: Path, files: list[Path], pattern: str, world_size: int) -> None:
    """Raises ConfigError unless there is one file of each rank from 0."""
    if len(files) != world_size:
        raise ConfigError(f"{path} has {len(files)} {pattern} files; its parameters are split over {world_size}")
    for rank, file in enumerate(files):
        if world_size > 1 and f"pp_rank_{rank}_" not in file.name:
            raise ConfigError(f"{path} has no {pattern} file of rank {rank}, but {file.name}")


def load_file(file: Path) -> Field:
    """What a file holds; read without running what it names.

    Raises:
        ConfigError: It is damaged, holds no dictionary, or its pickle names code.
    """
    state = load_inert(file)
    if not isinstance(state, dict):
        raise ConfigError(f"{file} holds a {type(state).__name__}; a DeepSpeed checkpoint file holds a dict")
    return Field(file, "", state)
