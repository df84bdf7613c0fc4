"""A run's records as a progress bar."""

from __future__ import annotations

from typing import TextIO

from tqdm import tqdm

from sidecast.trainer.run_log import Record

# On a terminal a bar is redrawn in place; in a log file every redraw is one more line to scroll past.
REDRAW_INTERVAL_S = 0.2
LOG_INTERVAL_S = 20.0


class ProgressBar:
    """Draws the records of one run as they come; nowcast events and validations are lines above the bar.

    Args:
        label: What is running.
        num_steps: Steps of the whole run.
        stream: Where the bar is drawn.
    """

    def __init__(self, label: str, num_steps: int, stream: TextIO) -> None:
        interval_s = REDRAW_INTERVAL_S if stream.isatty() else LOG_INTERVAL_S
        self._stream = stream
        self._bar = tqdm(total=num_steps, desc=label, unit="step", file=stream, mininterval=interval_s)

    def __call__(self, record: Record) -> None:
        kind = record["kind"]
        if kind == "train":
            self._bar.set_postfix_str(
                f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s, lr {record['lr']:.2e}",
                refresh=False,
            )
            self._bar.update(record["step"] - self._bar.n)
        elif kind == "validation":
            self._line(
                f"step {record['step']}: validation loss {record['loss']:.4f}, perplexity {record['perplexity']:.3f}"
            )
        elif kind == "nowcast":
            details = ", ".join(f"{name} {_short(value)}" for name, value in record["details"].items())
            self._line(f"step {record['step']}: nowcast {record['event'].replace('_', ' ')} {details}".rstrip())

    def close(self) -> None:
        self._bar.close()

    def _line(self, text: str) -> None:
        self._bar.write(text, file=self._stream)


def _short(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)[:16]
