"""Whether checkpoints are equally spaced states of one model, oldest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations, pairwise
from typing import Any

from sidecast.checkpoints.checkpoint import Checkpoint, resolved
from sidecast.checkpoints.steps import Step, known_steps
from sidecast.checkpoints.trainable import check_trainable
from sidecast.errors import ConfigError, shown

_TELLING = (
    *("model_type", "num_attention_heads", "num_key_value_heads", "n_head", "head_dim", "hidden_act"),
    *("activation_function", "rope_theta", "num_experts_per_tok"),
)
"""Settings of a model that its tensors' shapes do not show, and that no training changes."""
_TELLING_OF_ADAPTERS = ("peft_type", "base_model_name_or_path", "lora_alpha", "use_dora", "use_rslora")


def check_series(checkpoints: Sequence[Checkpoint], given_steps: Sequence[int] | None = None) -> list[Step | None]:
    """Checks that checkpoints can be the history of a nowcast.

    There must be at least two, each once, with the same tensors and shapes that a nowcast may work on, of one model;
    the steps that are known rise evenly, with room for those that are not.

    Args:
        checkpoints: Oldest first.
        given_steps: The steps that the user says they are of, in place of what files and names say.

    Returns:
        The step of each; None where it is unknown.

    Raises:
        ConfigError: They cannot.
    """
    if len(checkpoints) < 2:
        raise ConfigError(f"{len(checkpoints)} checkpoint given; a nowcast needs at least 2, oldest first")
    newest = checkpoints[-1]
    for one, other in combinations(checkpoints, 2):
        if resolved(one.path) == resolved(other.path):
            raise ConfigError(f"{one.path} and {other.path} are one checkpoint; give each once")
    for checkpoint in checkpoints:
        check_trainable(checkpoint)
    for checkpoint in checkpoints[:-1]:
        _check_same_tensors(newest, checkpoint)
        _check_same_model(newest, checkpoint)
    if not any(tensor.trainable for tensor in newest.tensors.values()):
        raise ConfigError(f"{newest.path} has no trainable tensor; a nowcast needs at least one of floating dtype")
    steps = known_steps(checkpoints, given_steps)
    _check_spacing(steps)
    return steps


def with_shared_aliases(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Checkpoints in which a tensor is an alias only if no other checkpoint holds it as a tensor of its own.

    An output layer may equal the table that it is tied to in one checkpoint, and differ in the next.
    """
    separate = {name for checkpoint in checkpoints for name in checkpoint.tensors}
    return [
        replace(
            checkpoint,
            tensors={
                **checkpoint.tensors,
                **{alias: checkpoint.tensors[name] for alias, name in checkpoint.aliases.items() if alias in separate},
            },
            aliases={alias: name for alias, name in checkpoint.aliases.items() if alias not in separate},
        )
        for checkpoint in checkpoints
    ]


def _check_same_tensors(newest: Checkpoint, other: Checkpoint) -> None:
    for name, tensor in newest.tensors.items():
        if name not in other.tensors:
            raise ConfigError(f"tensor {name!r} is in {newest.path} but not in {other.path}; all need the same tensors")
        stored = other.tensors[name]
        if stored.shape != tensor.shape:
            raise ConfigError(
                f"tensor {name!r} has shape {tensor.shape} in {newest.path} but {stored.shape} in {other.path}; "
                f"all need the same shapes"
            )
        if stored.dtype.is_floating_point != tensor.dtype.is_floating_point:
            raise ConfigError(
                f"tensor {name!r} is {str(tensor.dtype)[6:]} in {newest.path} but {str(stored.dtype)[6:]} in "
                f"{other.path}; all need floating elements there, or none"
            )
    for name in other.tensors:
        if name not in newest.tensors:
            raise ConfigError(f"tensor {name!r} is in {other.path} but not in {newest.path}; all need the same tensors")


def _check_same_model(newest: Checkpoint, other: Checkpoint) -> None:
    for what, keys, these, those in (
        ("config.json", _TELLING, newest.config, other.config),
        ("adapter_config.json", _TELLING_OF_ADAPTERS, newest.adapter_config, other.adapter_config),
    ):
        key = _first_difference(keys, these, those)
        if key is not None:
            assert these is not None
            assert those is not None
            raise ConfigError(
                f"{what} says {key}={shown(these[key])} for {newest.path} but {shown(those[key])} for {other.path}; "
                f"all need to be of one model"
            )


def _first_difference(
    keys: Sequence[str], these: Mapping[str, Any] | None, those: Mapping[str, Any] | None
) -> str | None:
    if these is None or those is None:
        return None
    return next((key for key in keys if key in these and key in those and these[key] != those[key]), None)


def _check_spacing(steps: Sequence[Step | None]) -> None:
    known = [(place, step) for place, step in enumerate(steps) if step is not None]
    if len(known) < 2:
        return
    listed = ", ".join("unknown" if step is None else str(step.number) for step in steps)
    what = f"the checkpoints' {known[0][1].unit}s are {listed}"
    way_out = f"(by {known[-1][1].source}; --steps A,B,C says what they are)"
    gaps = [(later[1].number - earlier[1].number, later[0] - earlier[0]) for earlier, later in pairwise(known)]
    if min(steps_between for steps_between, _ in gaps) <= 0:
        raise ConfigError(f"{what}; give them oldest first, each {known[0][1].unit} once {way_out}")
    if len({steps_between / places for steps_between, places in gaps}) > 1 or any(a % b for a, b in gaps):
        raise ConfigError(f"{what}; they must be equally spaced {way_out}")
