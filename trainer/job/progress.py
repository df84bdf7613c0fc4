"""A run's records as a progress bar."""

from __future__ import annotations

from typing import TextIO

from tqdm import tqdm

from sidecast.trainer.job.run_log import Record, is_pushed

# On a terminal a bar is redrawn in place; in a log file every redraw is one more line to scroll past.
REDRAW_INTERVAL_S = 0.2
LOG_INTERVAL_S = 20.0


class ProgressBar:
    """Draws the records of one run as they come; nowcast events and validations are lines above the bar.

    The bar appears with the ``run`` record: what is before it (imports, a compiler, the service) is no training.

    Args:
        label: What is running.
        num_steps: Steps of the whole run.
        stream: Where the bar is drawn.
    """

    def __init__(self, label: str, num_steps: int, stream: TextIO) -> None:
        self._label = label
        self._num_steps = num_steps
        self._stream = stream
        self._bar: tqdm | None = None
        self._has_pushes = False

    def __call__(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "run":
            self._has_pushes = is_pushed(record)
            self._bar = tqdm(
                total=self._num_steps,
                initial=record["start_step"],
                desc=self._label,
                unit="step",
                file=self._stream,
                mininterval=REDRAW_INTERVAL_S if self._stream.isatty() else LOG_INTERVAL_S,
            )
        elif kind == "train" and self._bar is not None:
            self._bar.set_postfix_str(
                f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s, lr {record['lr']:.2e}",
                refresh=False,
            )
            self._bar.update(record["step"] - self._bar.n)
        elif kind == "nowcast" and record["event"] == "applied" and self._has_pushes:
            # There are hundreds, and none is an event of its own.
            pass
        elif kind in ("validation", "nowcast"):
            tqdm.write(describe(record), file=self._stream)

    def close(self) -> None:
        """Leaves the bar as it is, on a line of its own."""
        if self._bar is not None:
            self._bar.close()


def describe(record: Record) -> str:
    """A ``validation`` or ``nowcast`` record as one line."""
    step = f"step {record['step']}"
    if record["kind"] == "validation":
        return f"{step}: validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.3f}"
    details = record["details"]
    line = f"{step}: nowcast {record['event'].replace('_', ' ')}"
    if record["event"] == "applied":
        return (
            f"{line} with weight {details['weight']:.2f}: {details['horizon_intervals']} snapshot intervals ahead, "
            f"{details['staleness_steps']} steps old"
        )
    return f"{line}: {details['reason']}" if "reason" in details else line
