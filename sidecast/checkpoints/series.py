"""Whether checkpoints are equally spaced states of one model, oldest first."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from sidecast.checkpoints.checkpoint import Checkpoint
from sidecast.errors import ConfigError


def check_series(checkpoints: Sequence[Checkpoint]) -> None:
    """Raises ConfigError unless the checkpoints can be the history of a nowcast.

    There must be at least two, with the same tensors and shapes; where all steps are known, they rise evenly.
    """
    if len(checkpoints) < 2:
        raise ConfigError(f"{len(checkpoints)} checkpoint given; a nowcast needs at least 2, oldest first")
    newest = checkpoints[-1]
    for checkpoint in checkpoints[:-1]:
        _check_same_tensors(newest, checkpoint)
    if not any(tensor.trainable for tensor in newest.tensors.values()):
        raise ConfigError(f"{newest.path} has no trainable tensor; a nowcast needs at least one of floating dtype")
    _check_spacing(checkpoints)


def _check_same_tensors(newest: Checkpoint, other: Checkpoint) -> None:
    for name, tensor in newest.tensors.items():
        if name not in other.tensors:
            raise ConfigError(f"tensor {name!r} is in {newest.path} but not in {other.path}; all need the same tensors")
        shape = other.tensors[name].shape
        if shape != tensor.shape:
            raise ConfigError(
                f"tensor {name!r} has shape {tensor.shape} in {newest.path} but {shape} in {other.path}; "
                f"all need the same shapes"
            )
    for name in other.tensors:
        if name not in newest.tensors:
            raise ConfigError(f"tensor {name!r} is in {other.path} but not in {newest.path}; all need the same tensors")


def _check_spacing(checkpoints: Sequence[Checkpoint]) -> None:
    steps = [checkpoint.step for checkpoint in checkpoints if checkpoint.step is not None]
    if len(steps) < len(checkpoints):
        return
    listed = ", ".join(str(step) for step in steps)
    intervals = [later - earlier for earlier, later in pairwise(steps)]
    if min(intervals) <= 0:
        raise ConfigError(f"the checkpoints' steps are {listed}; give them oldest first, each step once")
    if len(set(intervals)) > 1:
        raise ConfigError(
            f"the checkpoints' steps are {listed}; they must be equally spaced "
            f"(rename checkpoints whose trailing digits are no steps)"
        )
