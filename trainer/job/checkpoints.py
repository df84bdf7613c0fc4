"""Saving a run and going on with it, through DeepSpeed's own checkpoints.

Data order, learning rate and dropout are functions of the step, so what DeepSpeed saves (weights, optimizer, schedule
and step counters) is all there is to restore; what must not differ between the two runs is written beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed.comm as dist

from sidecast.errors import ConfigError

DIRECTORY_NAME = "checkpoints"
IDENTITY_NAME = "run_identity.json"
LATEST_NAME = "latest"


def save(engine: Any, directory: Path, identity: Mapping[str, Any]) -> None:
    """Writes one checkpoint of the engine's current step; every rank calls it.

    Args:
        engine: The DeepSpeed engine.
        directory: Holds all checkpoints of the run.
        identity: Settings that decide the run's numbers, checked again by `resume`.
    """
    if dist.get_rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / IDENTITY_NAME).write_text(json.dumps(identity, indent=2) + "\n")
    engine.save_checkpoint(str(directory), tag=f"step_{engine.global_steps:08d}")


def resume(engine: Any, directory: Path, identity: Mapping[str, Any], num_steps: int) -> int:
    """Restores the newest checkpoint; every rank calls it.

    Args:
        engine: A new DeepSpeed engine of the same configuration.
        directory: As given to `save`.
        identity: As given to `save`.
        num_steps: Steps of the whole run.

    Returns:
        Number of optimizer steps that the restored run has taken.

    Raises:
        ConfigError: There is no checkpoint, it belongs to another run, or that run is already over.
    """
    check_resumable(directory, identity)
    path, _ = engine.load_checkpoint(str(directory))
    if path is None:
        raise ConfigError(f"training.resume {str(directory)!r}: DeepSpeed found no checkpoint that it can load")
    step = int(engine.global_steps)
    if step >= num_steps:
        raise ConfigError(f"training.steps is {num_steps}; the checkpoint in {directory} is already at step {step}")
    return step


def check_resumable(directory: Path, identity: Mapping[str, Any]) -> None:
    """Raises ConfigError unless the directory holds a checkpoint of a run with this identity."""
    if not (directory / LATEST_NAME).is_file():
        raise ConfigError(
            f"training.resume is {str(directory)!r}, but there is no {directory / LATEST_NAME}; "
            "give a directory that checkpoints were saved to"
        )
    try:
        saved = json.loads((directory / IDENTITY_NAME).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{directory / IDENTITY_NAME} cannot be read; it is written with every checkpoint") from error
    for key, value in identity.items():
        if saved.get(key) != value:
            raise ConfigError(
                f"cannot resume from {directory}: {key} is {value!r}, but it was {saved.get(key)!r} when it was saved"
            )
