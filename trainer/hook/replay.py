"""Repeats a recorded run's jumps at their steps, without a service: same weights, same losses, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.trainer.hook.jump import merge
from sidecast.trainer.hook.reporting import NowcastEvent
from sidecast.trainer.partitions import Partition, RollbackCopy
from sidecast.trainer.pipe.apply_log import read_delta, read_log


class Replayer:
    """Implements ``Hook`` from a log, where the nowcasting hook asks a service.

    Args:
        folder: Written by a run with ``record_dir``, with as many ranks and the same partitions.
        partition: What this rank holds.
        rank: Global rank.
        step: Optimizer steps applied so far; earlier entries of the log are passed over.
        on_close: Is called once the replay ends.

    Raises:
        ConfigError: The folder has no log of this rank.
    """

    def __init__(
        self, folder: Path, partition: Partition, *, rank: int, step: int, on_close: Callable[[], None] | None = None
    ) -> None:
        self.step = step
        self.is_closed = False
        self._on_close = on_close
        self._folder = folder
        self._partition = partition
        self._num_bytes = 4 * sum(shard.numel for shard in partition.owned_shards)
        self._entries = read_log(folder, rank)
        self._position = 0
        self._skip_to(step)
        self._copy: RollbackCopy | None = None
        self._base: Tensor | None = None
        self._listeners: list[Callable[[NowcastEvent], None]] = []
        self._num_applied = self._num_rolled_back = 0

    def _skip_to(self, step: int) -> None:
        self._position = sum(entry["step"] <= step for entry in self._entries)

    def after_skipped_step(self) -> None:
        """Not needed: nothing was done at such a step."""

    def observe(self, loss: Tensor | float) -> None:
        """Not needed: what the losses decided is in the log."""

    def add_listener(self, callback: Callable[[NowcastEvent], None]) -> None:
        """Calls back with every replayed event, on the training thread."""
        self._listeners.append(callback)

    def after_step(self, step: int) -> None:
        """Repeats what was done at this step."""
        if step == self.step or self.is_closed:
            return
        self.step = step
        self._keep_base()
        while self._position < len(self._entries) and self._entries[self._position]["step"] == step:
            entry = self._entries[self._position]
            self._position += 1
            if entry["action"] == "applied":
                self._apply(entry)
            else:
                self._undo()

    def _keep_base(self) -> None:
        """Keeps the weights of now if the next jump starts from them."""
        following = self._entries[self._position : self._position + 1]
        if following and following[0].get("merge") == "replace" and following[0]["base_step"] == self.step:
            self._base = torch.empty(self._num_bytes // 4)
            self._partition.read_owned(self._base)

    def _apply(self, entry: dict[str, Any]) -> None:
        delta = read_delta(self._folder, entry, self._num_bytes)
        following = self._entries[self._position : self._position + 1]
        if following and following[0]["action"] == "rolled_back":
            if self._copy is None:
                self._copy = RollbackCopy.allocate(self._partition.rollback_bytes())
            self._partition.capture(self._copy)
        values = torch.frombuffer(delta, dtype=torch.float32) if delta else torch.empty(0)
        if entry["merge"] == "replace" and self._base is None:
            raise ConfigError(
                f"the jump of step {self.step} replaces weights of step {entry['base_step']}, "
                "which lies before the step to resume from"
            )
        base, self._base = self._base, None
        merge(self._partition, values, entry["weight"], base=base, moments=entry["moments"])
        self._num_applied += 1
        details = {key: value for key, value in entry.items() if key not in ("action", "policy")}
        self._emit(NowcastEvent("applied", self.step, entry.get("policy", "jump"), details))

    def _undo(self) -> None:
        if self._copy is None:
            raise ConfigError(f"the log undoes a jump at step {self.step} that lies before the step to resume from")
        self._partition.restore(self._copy)
        self._num_rolled_back += 1
        self._emit(NowcastEvent("rolled_back", self.step, "jump"))

    def _emit(self, event: NowcastEvent) -> None:
        for callback in self._listeners:
            callback(event)

    def state_dict(self) -> None:
        """Nothing for a checkpoint to keep: the log has it all."""

    def resume(self, state: Mapping[str, Any] | None, step: int, run_id: str, *, is_kept: bool = False) -> None:
        """Goes on from a loaded checkpoint, by its step alone."""
        self._copy = self._base = None
        self.step = step
        self._skip_to(step)

    @property
    def is_on_probation(self) -> bool:
        """Never: whether a jump paid is in the log."""
        return False

    def rollback_state(self) -> None:
        """Nothing for a checkpoint to keep, as no jump is on probation."""

    def load_rollback_copy(self, state: Mapping[str, Any]) -> None:
        """Not needed, as no jump is on probation."""

    def end_probation(self) -> None:
        """Not needed, as no jump is on probation."""

    def summary(self) -> dict[str, Any]:
        """What has been repeated so far."""
        return {"num_applied": self._num_applied, "num_rolled_back": self._num_rolled_back}

    def close(self) -> None:
        """Ends the replay."""
        if self.is_closed:
            return
        self.is_closed = True
        self._copy = self._base = None
        if self._on_close is not None:
            self._on_close()
