"""Making one push, over files on this node: the interval's own motion into the average, the average into a push.

It runs at the speed of memory: 16 bytes are read and 4 written per parameter to average, 4 read to name the average by
a digest, 4 read and 4 written to make the push. The new average is written over the state before, piece by piece, and
only once it is whole, and noted to be, is the push written over the average so far: whenever this ends, one is whole.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.keeping.run_folder import Note
from sidecast.nowcaster_service.keeping.sealed import write_sealed
from sidecast.nowcaster_service.vector_files import gone, map_vector, written_alone
from sidecast.policies.push import PushConfig, average_interval_
from sidecast.protos.bf16 import round_in_place
from sidecast.protos.codec import vector_digest

log = logging.getLogger(__name__)


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
        before_path: The snapshot before, to be overwritten with the new average own motion per unit of learning rate.
        begins: Whether the average begins now, from zeros, and what ``delta_path`` holds means nothing.
        applied_path: What was added to the weights within the interval; None for nothing.
        applied_weight: With which factor.
        delta_path: The average so far, to be overwritten with the push.
        max_relative_norm: Largest accepted ||push|| / ||state||.
        rounds_to_bf16: The push is to hold only values that bf16 holds exactly, as it will travel.
        note: Where to note that the new average is whole; None: nowhere.
        factor: What the new average, which is in ``before_path`` already, is to be multiplied with; None if it is not.
    """

    manifest_json: str
    push: PushConfig
    step: int
    num_steps: int
    learning_rate_sum: float
    state_path: Path
    before_path: Path
    begins: bool
    applied_path: Path | None
    applied_weight: float
    delta_path: Path
    max_relative_norm: float
    rounds_to_bf16: bool = False
    note: Note | None = None
    factor: float | None = None


@dataclass(frozen=True)
class MadePush:
    """What has been made.

    Attributes:
        is_empty: Whether there is no push, and what is in ``delta_path`` means nothing.
        carry_digest: Of the new average; see ``vector_digest``.
    """

    is_empty: bool
    carry_digest: int


@torch.no_grad()
def make_push(request: PushRequest) -> MadePush:
    """Averages, and writes the push.

    Raises:
        ConfigError: A file is gone, or is not of the model's size; or a value is not finite.
    """
    with written_alone(request.before_path, request.delta_path):
        return _make_push(request)


def _note(note: Note, factor: float, carry_digest: int) -> None:
    try:
        write_sealed(note.path, {"factor": factor, "carry_digest": carry_digest}, note.key)
    except FileNotFoundError:
        # A later service has moved the run's folder away and waits for the locks: the average so far must stay whole.
        raise gone(note.path) from None
    except OSError as error:
        log.warning("an end of the service would cost the average now: %s cannot be written: %s", note.path, error)


def _make_push(request: PushRequest) -> MadePush:
    manifest = ModelManifest.from_json(request.manifest_json)
    fp32 = torch.float32
    state_P = map_vector(request.state_path, manifest, fp32)
    before_P = map_vector(request.before_path, manifest, fp32, writable=True)
    delta_P = map_vector(request.delta_path, manifest, fp32, writable=True)
    applied_P = None if request.applied_path is None else map_vector(request.applied_path, manifest, fp32)
    factor = request.factor
    if factor is None:
        if request.begins:
            delta_P.zero_()
        factor = average_interval_(
            request.push,
            delta_P,
            before_P,
            state_P,
            step=request.step,
            num_steps=request.num_steps,
            lr_sum=request.learning_rate_sum,
            applied_P=applied_P,
            weight=request.applied_weight,
            over_before=True,
        )
    if factor is None:
        raise ConfigError(f"the state of step {request.step}, or what is known of the run's motion, is not finite")
    carry_digest = vector_digest(before_P.numpy().data.cast("B"))
    if request.note is not None and request.factor is None:
        _note(request.note, factor, carry_digest)
    if factor > 0.0:
        torch.mul(before_P, factor, out=delta_P)
        if request.rounds_to_bf16:
            # Here, where the file is still this engine's alone.
            round_in_place(delta_P.numpy())
    return MadePush(is_empty=factor <= 0.0, carry_digest=carry_digest)
