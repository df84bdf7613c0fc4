"""The courier's and the service's parts played by one process that trains alone: keeps the window, makes nowcasts.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.horizon import horizon_at, resolve_horizons
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History, ModelPredictor, Predictor, check_context_len
from sidecast.predictors.jump_norm import jump_norm
from sidecast.predictors.passes import PassPredictor
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.messages import Message

log = logging.getLogger(__name__)

FP32_BYTES = 4


@dataclass(frozen=True)
class Window:
    """States of one epoch at equal distances, as slots, oldest first.

    Attributes:
        last_step: Optimizer step of the newest state.
        epoch: Of all of them.
        slots: Where they lie.
    """

    last_step: int = 0
    epoch: int = 0
    slots: tuple[int, ...] = ()


class InProcessNowcaster:
    """Implements ``Messenger`` with a predictor of its own; its staging slots are the history.

    Args:
        config: Settings; ``mode`` ``sync`` predicts on the calling thread when the hook waits for it, ``async`` on
            another thread.
        manifest: The model.
        predictor: What predicts.

    Raises:
        ConfigError: The predictor cannot work on this model or window, or there is no memory for the window.
    """

    num_deaths = 0

    def __init__(self, config: NowcasterConfig, manifest: ModelManifest, predictor: Predictor) -> None:
        self._config = config
        self._manifest = manifest
        self._predictor = predictor
        self._horizons = _prepared_horizons(config, manifest, predictor)
        # The window after it may begin while the thread still reads the one before.
        num_slots = config.context_len + (config.mode == "async")
        num_bytes = FP32_BYTES * manifest.num_elements
        self.slots = [SharedBuffer(f"window-{index}", num_bytes) for index in range(num_slots)]
        self.prediction = SharedBuffer("prediction", num_bytes)
        self.session_id = uuid.uuid4().hex[:16]
        self._states = [_vector(slot) for slot in self.slots]
        self._delta_P = _vector(self.prediction)
        self._free_slots = list(range(num_slots))
        self._window = Window()
        self._due: Window | None = None
        self._is_held = False
        self._messages: deque[Message] = deque()
        self._thread = ThreadPoolExecutor(1, "sidecast-nowcast") if config.mode == "async" else None
        self._running: Future[Message] | None = None

    @property
    def has_free_slot(self) -> bool:
        return bool(self._free_slots) or (self._due is not None and self._running is None)

    def take_slot(self) -> int | None:
        if self._due is not None and self._running is None:
            # The hook did not wait for it: jumps are suspended, or one is on probation.
            self._finish()
        return self._free_slots.pop() if self._free_slots else None

    def return_slot(self, slot: int) -> None:
        self._free_slots.append(slot)

    def post(self, message: Message, *, may_be_lost: bool = False) -> bool:
        # Reports and metrics are for a service.
        if message["type"] == "snapshot":
            self._add(message["slot"], message["step"], message["epoch"])
        return True

    def receive(self, timeout_s: float = 0.0) -> Iterator[Message]:
        while self._messages:
            yield self._messages.popleft()
        if self._due is None:
            return
        if self._running is not None:
            if not self._running.done():
                return
            message = self._running.result()
        elif timeout_s > 0:
            message = self._nowcast(self._due)
        else:
            return
        self._finish()
        self._is_held = message["type"] == "prediction"
        yield message

    def release_prediction(self, record: Mapping[str, Any] | None) -> None:
        self._is_held = False

    def log(self, record: Mapping[str, Any]) -> None:
        """There is no apply log: such a run repeats itself from its seed."""

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        self._states, self._delta_P = [], torch.empty(0)
        for buffer in (*self.slots, self.prediction):
            buffer.close()
        self.slots = []

    def state_dict(self) -> dict[str, Any]:
        """The window, for a checkpoint; its states are the memory itself."""
        window = self._due or self._window
        states = [self._states[slot] for slot in window.slots]
        return {"last_step": window.last_step, "epoch": window.epoch, "states": states}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes over what ``state_dict`` gave, without what was being predicted; None: begins a new window."""
        if self._running is not None:
            self._running.result()
        self._finish()
        self._messages.clear()
        self._is_held = False
        self._free_slots += self._window.slots
        self._window = Window()
        if state is None:
            return
        first_step = state["last_step"] - self._config.interval_steps * (len(state["states"]) - 1)
        for index, saved_P in enumerate(state["states"]):
            slot = self._free_slots.pop()
            self._states[slot].copy_(saved_P)
            self._add(slot, first_step + index * self._config.interval_steps, state["epoch"])
        # They were announced before the checkpoint.
        self._messages.clear()

    def _add(self, slot: int, step: int, epoch: int) -> None:
        window = self._window
        follows = epoch == window.epoch and step == window.last_step + self._config.interval_steps
        if not follows:
            self._free_slots += window.slots
            window = Window()
        self._window = Window(step, epoch, (*window.slots, slot))
        self._messages.append({"type": "committed", "step": step})
        if step % self._config.period_steps == 0:
            window, self._window = self._window, Window()
            reason = self._why_not(window)
            if reason:
                self._free_slots += window.slots
                self._messages.append(_failure(step, reason))
                return
            self._due = window
            if self._thread is not None:
                self._running = self._thread.submit(self._nowcast, window)

    def _why_not(self, window: Window) -> str:
        if len(window.slots) < self._config.context_len:
            return f"its window has {len(window.slots)} of {self._config.context_len} states"
        return "the nowcast before is not over" if self._due is not None or self._is_held else ""

    def _finish(self) -> None:
        if self._due is not None:
            self._free_slots += self._due.slots
        self._due = self._running = None

    @torch.no_grad()
    def _nowcast(self, window: Window) -> Message:
        started_s = time.perf_counter()
        history = History(self._manifest, [self._states[slot] for slot in window.slots])
        horizon_intervals = horizon_at(self._horizons, window.last_step, self._config.period_steps)
        try:
            self._predictor.predict(history, horizon_intervals, self._delta_P)
        except Exception as error:
            # Whatever a predictor does wrong, the run that it looks at goes on.
            log.warning("no nowcast at step %d", window.last_step, exc_info=not isinstance(error, ConfigError))
            return _failure(window.last_step, str(error))
        relative_norm = jump_norm(self._delta_P, history.states[-1])
        if not math.isfinite(relative_norm):
            return _failure(window.last_step, "the prediction, or the state that it starts from, is not finite")
        if relative_norm > self._config.max_relative_norm:
            allowed = self._config.max_relative_norm
            return _failure(window.last_step, f"the jump's relative norm is {relative_norm:.4g}; allowed: {allowed:g}")
        return {
            "type": "prediction",
            "session_id": self.session_id,
            "version": window.last_step // self._config.period_steps,
            "base_step": window.last_step,
            "epoch": window.epoch,
            "horizon_intervals": horizon_intervals,
            # Names a prediction among ranks; there are none.
            "digest": 0,
            "relative_norm": relative_norm,
            "nowcast_s": time.perf_counter() - started_s,
            "bytes": 0,
        }


def _vector(buffer: SharedBuffer) -> Tensor:
    return torch.frombuffer(buffer.map, dtype=torch.float32, count=buffer.num_bytes // FP32_BYTES)


def _failure(step: int, reason: str) -> Message:
    return {"type": "failed", "step": step, "reason": reason}


def _prepared_horizons(config: NowcasterConfig, manifest: ModelManifest, predictor: Predictor) -> Sequence[int]:
    """The horizons of the run, after the predictor has said that it can work on this model so far ahead."""
    check_context_len(predictor, config.context_len)
    horizons = resolve_horizons(
        config.horizon.schedule or "",
        config.horizon.max or 0,
        config.horizon.power,
        config.max_steps or 0,
        config.period_steps,
        predictor.max_horizon,
    )
    if isinstance(predictor, ModelPredictor):
        predictor.prepare(manifest)
    if isinstance(predictor, PassPredictor):
        predictor.plan(manifest, max(horizons))
    return horizons
