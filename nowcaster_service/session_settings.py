"""What rank 0 announces of a run, checked, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from sidecast.horizon import horizon_at
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.vector_store import FP32_BYTES

# A second snapshot may begin before the last rank has finished the first; a third means that somebody gave up.
MAX_RECEIVING = 2
# Beside the c states of the window: those being received, and a prediction each being made, published and, though
# replaced, still fetched.
NUM_EXTRA_VECTORS = MAX_RECEIVING + 3


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """What rank 0 announced, already validated.

    Attributes:
        session_id: New at every attach and resume.
        run_id: The same for all sessions of one run.
        world_size: Number of ranks.
        manifest: The model.
        context_len: c, states per nowcast.
        snapshot_interval_steps: Optimizer steps between snapshots.
        period_steps: Optimizer steps between nowcasts.
        horizons: Horizon of the n-th nowcast in snapshot intervals; the last one repeats.
        predictor: Name of the predictor.
        predictor_options: Its options.
        max_relative_norm: Largest accepted ||prediction - base|| / ||base||.
        rounds_to_bf16: Predictions are rounded to bf16 before they are checked and published.
    """

    session_id: str
    run_id: str
    world_size: int
    manifest: ModelManifest
    context_len: int
    snapshot_interval_steps: int
    period_steps: int
    horizons: tuple[int, ...]
    predictor: str
    predictor_options: Mapping[str, object]
    max_relative_norm: float
    rounds_to_bf16: bool = False

    def horizon_at(self, base_step: int) -> int:
        """The horizon of the nowcast made at a step, in snapshot intervals: a function of the step alone."""
        return horizon_at(self.horizons, base_step, self.period_steps)

    def predicts_like(self, other: SessionSettings) -> bool:
        """Whether its nowcasts would be those of another session of the run, however many ranks share them."""
        if self.manifest.schema_hash != other.manifest.schema_hash:
            return False
        others = replace(other, session_id=self.session_id, world_size=self.world_size, manifest=self.manifest)
        return self == others

    @property
    def num_vector_bytes(self) -> int:
        return self.manifest.num_elements * FP32_BYTES

    @property
    def needed_bytes(self) -> int:
        """Most history that this session can hold at once."""
        return (self.context_len + NUM_EXTRA_VECTORS) * self.num_vector_bytes
