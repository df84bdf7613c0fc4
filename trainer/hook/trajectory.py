"""Where a run is: which run, how many optimizer steps, and which epoch of its states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sidecast.trainer.pipe.messages import Prediction


class Trajectory:
    """The one home of a rank's run, step and epoch; equal on all ranks at a step boundary.

    Args:
        run_id: Of the run; kept over resumes.
        step: Optimizer steps applied so far.

    Attributes:
        run_id: Of the run; another one once a checkpoint of another run was loaded.
        step: Optimizer steps applied so far.
        epoch: How many jumps and rollbacks there have been; states of different epochs never mix in a nowcast.
    """

    def __init__(self, run_id: str, step: int) -> None:
        self.run_id = run_id
        self.step = step
        self.epoch = 0

    def begin_epoch(self) -> None:
        """Takes note of a jump or a rollback."""
        self.epoch += 1

    def why_unusable(self, prediction: Prediction, max_staleness_steps: int) -> str:
        """Why a prediction can never be applied any more, from this step on; empty if it still can."""
        if prediction.epoch != self.epoch:
            return f"its base is of epoch {prediction.epoch}, this is epoch {self.epoch}"
        staleness_steps = self.step - prediction.base_step
        return f"its base is {staleness_steps} steps old" if staleness_steps > max_staleness_steps else ""

    def stays_usable(self, prediction: Prediction, state: Mapping[str, Any] | None, step: int) -> bool:
        """Whether a prediction is of use after a checkpoint was loaded, which lies on its trajectory, after its base.

        Args:
            prediction: Made for this run.
            state: What ``state`` gave when the checkpoint was saved; None if it was saved without the hook.
            step: Optimizer steps applied in the checkpoint.
        """
        if state is None:
            return False
        return (state["run_id"], state["epoch"]) == (self.run_id, prediction.epoch) and prediction.base_step <= step

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"run_id": self.run_id, "epoch": self.epoch, "step": self.step}

    def resume(self, state: Mapping[str, Any] | None, run_id: str, step: int) -> None:
        """Goes on from a loaded checkpoint.

        Args:
            state: What ``state`` gave; None if the checkpoint was saved without the hook.
            run_id: The run's identity if the checkpoint has none.
            step: Optimizer steps applied in the checkpoint.
        """
        self.run_id = run_id if state is None else state["run_id"]
        self.epoch = 0 if state is None else state["epoch"]
        self.step = step
