"""A predictor as someone else's package brings it, that predicts only once a test lets it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sidecast.predictors.base import History


class GatedPredictor:
    """Repeats the window's change, after it has told a test and been told to go on, each through a named pipe.

    Args:
        begun: Opened for writing when a prediction begins; waits for a reader.
        go: Opened for reading after that; waits for a writer.
    """

    name = "gated"
    context_len = None
    max_horizon = 1

    def __init__(self, *, begun: str, go: str) -> None:
        self._begun, self._go = Path(begun), Path(go)

    def predict(self, history: History, horizon_intervals: int, out: Tensor) -> None:
        self._begun.write_text("begun")
        self._go.read_text()
        out.copy_(history.states[-1] - history.states[0])
