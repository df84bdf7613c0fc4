"""Making one push, over files on this node: the interval's own motion into the average, the average into a push.

It runs at the speed of memory: 16 bytes are read and 4 written per parameter to average, 4 and 4 to make the push.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.vector_files import map_vector
from sidecast.policies.push import PushConfig, average_interval_


@dataclass(frozen=True, kw_only=True)
class PushRequest:
    """One push over files of P fp32 values on this node.

    Attributes:
        manifest_json: The model.
        push: Settings of the run's pushes.
        step: Of the snapshot.
        num_steps: Optimizer steps since the one before.
        learning_rate_sum: Of those steps.
        state_path: The snapshot.
        carry_path: The average own motion per unit of learning rate; the interval's is averaged into it.
        begins: Whether the average begins now, from zeros, and what its file holds means nothing.
        applied_path: What was added to the weights within the interval; None for nothing.
        applied_weight: With which factor.
        delta_path: The snapshot before, to be overwritten with the push.
        max_relative_norm: Largest accepted ||push|| / ||state||.
        rounds_to_bf16: The push is to hold only values that bf16 holds exactly, as it will travel.
    """

    manifest_json: str
    push: PushConfig
    step: int
    num_steps: int
    learning_rate_sum: float
    state_path: Path
    carry_path: Path
    begins: bool
    applied_path: Path | None
    applied_weight: float
    delta_path: Path
    max_relative_norm: float
    rounds_to_bf16: bool = False


@torch.no_grad()
def make_push(request: PushRequest) -> bool:
    """Averages, and writes the push over the snapshot before.

    Returns:
        Whether there is a push; if not, what is in ``delta_path`` means nothing.

    Raises:
        ConfigError: A file is gone, or is not of the model's size; or a value is not finite.
    """
    manifest = ModelManifest.from_json(request.manifest_json)
    fp32 = torch.float32
    state_P = map_vector(request.state_path, manifest, fp32)
    delta_P = map_vector(request.delta_path, manifest, fp32, writable=True)
    carry_P = map_vector(request.carry_path, manifest, fp32, writable=True)
    applied_P = None if request.applied_path is None else map_vector(request.applied_path, manifest, fp32)
    if request.begins:
        carry_P.zero_()
    factor = average_interval_(
        request.push,
        carry_P,
        delta_P,
        state_P,
        step=request.step,
        num_steps=request.num_steps,
        lr_sum=request.learning_rate_sum,
        applied_P=applied_P,
        weight=request.applied_weight,
    )
    if factor is None:
        raise ConfigError(f"the state of step {request.step}, or what is known of the run's motion, is not finite")
    if factor > 0.0:
        torch.mul(carry_P, factor, out=delta_P)
    return factor > 0.0
