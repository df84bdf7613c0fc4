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
from typing import Any, assert_never

import torch

from sidecast.errors import ConfigError
from sidecast.horizon import horizon_at, resolve_horizons
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History, ModelPredictor, Predictor, check_context_len
from sidecast.predictors.jump_norm import jump_norm
from sidecast.predictors.passes import PassPredictor
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.messenger import ForHook, FromHook
from sidecast.trainer.hook.slots import FP32_BYTES, Slot, SlotState, as_tensor, has_free, take_free
from sidecast.trainer.partitions import Partition
from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.messages import Committed, Failed, Prediction, Report, Snapshot, Stats

log = logging.getLogger(__name__)


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
    slots: tuple[Slot, ...] = ()

    def free(self) -> None:
        """Gives the slots back."""
        for slot in self.slots:
            slot.free()


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
    state_key = "window"
    """Under which a checkpoint keeps what ``state_dict`` gives."""

    def __init__(self, config: NowcasterConfig, manifest: ModelManifest, predictor: Predictor) -> None:
        self._config = config
        self._manifest = manifest
        self._predictor = predictor
        self._horizons = _prepared_horizons(config, manifest, predictor)
        # The window after it may begin while the thread still reads the one before.
        num_slots = config.context_len + (config.mode == "async")
        num_bytes = FP32_BYTES * manifest.num_elements
        self.slots = [Slot(index, SharedBuffer(f"window-{index}", num_bytes)) for index in range(num_slots)]
        self.prediction = SharedBuffer("prediction", num_bytes)
        self.session_id = uuid.uuid4().hex[:16]
        self.held: Prediction | None = None
        self._delta_P = as_tensor(self.prediction)
        self._window = Window()
        self._due: Window | None = None
        self._messages: deque[Committed | Failed] = deque()
        self._thread = ThreadPoolExecutor(1, "sidecast-nowcast") if config.mode == "async" else None
        self._running: Future[Prediction | Failed] | None = None

    @property
    def has_free_slot(self) -> bool:
        return has_free(self.slots) or (self._due is not None and self._running is None)

    def take_slot(self) -> Slot | None:
        if self._due is not None and self._running is None:
            # The hook did not wait for it: jumps are suspended, or one is on probation.
            self._finish()
        return take_free(self.slots)

    def before_step(self, step: int, learning_rate_sum: float, partition: Partition) -> None:
        """Nothing: a window begins with a snapshot."""

    def post(self, message: FromHook, *, may_be_lost: bool = False) -> bool:
        match message:
            case Snapshot(slot=index, step=step, epoch=epoch):
                self._add(self.slots[index], step, epoch)
            case Report() | Stats():
                # For a service and for metrics; there are none.
                pass
            case _:
                assert_never(message)
        return True

    def receive(self, timeout_s: float = 0.0) -> Iterator[ForHook]:
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
        self.held = message if isinstance(message, Prediction) else None
        yield message

    def release_prediction(self, record: Mapping[str, Any] | None) -> None:
        self.held = None

    def log(self, record: Mapping[str, Any]) -> None:
        """There is no apply log: such a run repeats itself from its seed."""

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        self._finish()
        self._window = Window()
        self._delta_P = torch.empty(0)
        for slot in self.slots:
            slot.close()
        self.prediction.close()
        self.slots = []

    def state_dict(self) -> dict[str, Any]:
        """The window, for a checkpoint; its states are the memory itself."""
        window = self._due or self._window
        return {
            "last_step": window.last_step,
            "epoch": window.epoch,
            "interval_steps": self._config.interval_steps,
            "states": [slot.values for slot in window.slots],
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Takes over what ``state_dict`` gave, without what was being predicted; None: begins a new window.

        So does a window of other distances, or a longer one, since a nowcast needs one of these settings.

        Raises:
            ConfigError: It is of another model.
        """
        if self._running is not None:
            self._running.result()
        self._finish()
        self._messages.clear()
        self.held = None
        self._window.free()
        self._window = Window()
        fits = state is not None and (
            state["interval_steps"] == self._config.interval_steps and len(state["states"]) <= len(self.slots)
        )
        if state is None or not fits:
            return
        for saved_P in state["states"]:
            if saved_P.shape != self._delta_P.shape:
                raise ConfigError(
                    f"the checkpoint's window is of {saved_P.numel()} parameters; allowed: {self._delta_P.numel()}, as "
                    "this model has"
                )
        first_step = state["last_step"] - self._config.interval_steps * (len(state["states"]) - 1)
        for index, saved_P in enumerate(state["states"]):
            slot = take_free(self.slots)
            assert slot is not None, "there are enough"
            slot.values.copy_(saved_P)
            self._add(slot, first_step + index * self._config.interval_steps, state["epoch"])
        # They were announced before the checkpoint.
        self._messages.clear()

    def _add(self, slot: Slot, step: int, epoch: int) -> None:
        window = self._window
        follows = epoch == window.epoch and step == window.last_step + self._config.interval_steps
        if not follows:
            window.free()
            window = Window()
        slot.state = SlotState.POSTED
        self._window = Window(step, epoch, (*window.slots, slot))
        self._messages.append(Committed(step=step))
        if step % self._config.period_steps == 0:
            window, self._window = self._window, Window()
            reason = self._why_not(window)
            if reason:
                window.free()
                self._messages.append(Failed(step=step, reason=reason))
                return
            self._due = window
            if self._thread is not None:
                self._running = self._thread.submit(self._nowcast, window)

    def _why_not(self, window: Window) -> str:
        if len(window.slots) < self._config.context_len:
            return f"its window has {len(window.slots)} of {self._config.context_len} states"
        return "the nowcast before is not over" if self._due is not None or self.held is not None else ""

    def _finish(self) -> None:
        if self._due is not None:
            self._due.free()
        self._due = self._running = None

    @torch.no_grad()
    def _nowcast(self, window: Window) -> Prediction | Failed:
        started_s = time.perf_counter()
        history = History(self._manifest, [slot.values for slot in window.slots])
        horizon_intervals = horizon_at(self._horizons, window.last_step, self._config.period_steps)
        try:
            self._predictor.predict(history, horizon_intervals, self._delta_P)
        except Exception as error:
            # Whatever a predictor does wrong, the run that it looks at goes on.
            log.warning("no nowcast at step %d", window.last_step, exc_info=not isinstance(error, ConfigError))
            return Failed(step=window.last_step, reason=str(error))
        relative_norm = jump_norm(self._delta_P, history.states[-1])
        if reason := why_refused(relative_norm, self._config):
            return Failed(step=window.last_step, reason=reason)
        return Prediction(
            session_id=self.session_id,
            version=window.last_step // self._config.period_steps,
            base_step=window.last_step,
            epoch=window.epoch,
            horizon_intervals=horizon_intervals,
            # Names a prediction among ranks; there are none.
            digest=0,
            relative_norm=relative_norm,
            nowcast_s=time.perf_counter() - started_s,
            num_bytes=0,
        )


def why_refused(relative_norm: float, config: NowcasterConfig) -> str:
    """Why a prediction must not be applied, by ||prediction|| / ||state||; empty if it may be."""
    if not math.isfinite(relative_norm):
        return "the prediction, or the state that it starts from, is not finite"
    if relative_norm > config.max_relative_norm:
        return f"the jump's relative norm is {relative_norm:.4g}; allowed: {config.max_relative_norm:g}"
    return ""


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
