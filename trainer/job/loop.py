"""The training loop: batches in, optimizer steps and records out."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed.comm as dist
import torch
from torch import Tensor
from torch.nn import functional

from sidecast.trainer.job import checkpoints
from sidecast.trainer.job.config import TrainingConfig
from sidecast.trainer.job.data import Batch, DataOrder
from sidecast.trainer.job.run_log import Record, Sink


class TrainingLoop:
    """Runs an engine over its data; every rank runs one, in lockstep.

    Args:
        engine: The DeepSpeed engine, with a nowcaster attached or not.
        config: The run's settings.
        order: This rank's samples.
        identity: See `checkpoints.save`.
        sinks: Receive every record; none except on rank 0.
    """

    def __init__(
        self,
        engine: Any,
        config: TrainingConfig,
        order: DataOrder,
        identity: Mapping[str, Any],
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._engine = engine
        self._config = config
        self._order = order
        self._identity = identity
        self._sinks = sinks
        self._training_s = 0.0
        self._tokens_per_step = (
            order.world_size * order.micro_batch_size * order.num_micro_batches * (order.sequence_length)
        )

    @property
    def training_s(self) -> float:
        """Seconds spent in the training steps logged so far, validations and checkpoints left out."""
        return self._training_s

    def run(self, start_step: int) -> None:
        """Trains from ``start_step`` (optimizer steps already taken) to the end of the run."""
        config = self._config
        logged_step = start_step
        loss_sum = torch.zeros((), device=self._engine.device)
        started_s = time.perf_counter()
        for step in range(start_step, config.steps):
            loss_sum += self._train_step(step)
            done = step + 1
            last = done == config.steps
            if last or done % config.log_interval_steps == 0:
                num_steps = done - logged_step
                loss = self._mean_over_ranks(loss_sum / num_steps)
                interval_s = time.perf_counter() - started_s
                self._training_s += interval_s
                self._log_step(done, loss, num_steps, interval_s)
                logged_step = done
                loss_sum.zero_()
                started_s = time.perf_counter()
            validate = last or done % config.validation_interval_steps == 0
            save = config.checkpoint_interval_steps is not None and done % config.checkpoint_interval_steps == 0
            if validate or save:
                paused_s = time.perf_counter()
                if validate:
                    self._emit(self._validate(done))
                if save:
                    checkpoints.save(self._engine, Path(config.run_dir) / checkpoints.DIRECTORY_NAME, self._identity)
                # The interval goes on where it was: its steps so far are still to be logged, and so is their time.
                started_s += time.perf_counter() - paused_s

    def _train_step(self, step: int) -> Tensor:
        torch.manual_seed(self._order.dropout_seed(step))
        self._engine.train()
        loss_sum = torch.zeros((), device=self._engine.device)
        for batch in self._order.micro_batches(step):
            loss = self._loss(batch)
            self._engine.backward(loss)
            self._engine.step()
            loss_sum += loss.detach()
        return loss_sum / self._order.num_micro_batches

    def _loss(self, batch: Batch) -> Tensor:
        batch = batch.to(self._engine.device)
        logits_BLV = self._engine(input_ids=batch.inputs, use_cache=False).logits
        return functional.cross_entropy(logits_BLV.flatten(0, 1).float(), batch.targets.flatten())

    def _validate(self, step: int) -> Record:
        started_s = time.perf_counter()
        self._engine.eval()
        with torch.no_grad():
            batches = self._order.validation_batches(self._config.data.validation_sequences)
            losses = torch.stack([self._loss(batch) for batch in batches])
        loss = self._mean_over_ranks(losses.mean())
        return {
            "kind": "validation",
            "step": step,
            "loss": loss,
            # A loss of more than 700 nats would not fit a double; such a run has diverged anyway.
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "training_s": self._training_s,
            "validation_s": time.perf_counter() - started_s,
        }

    def _log_step(self, step: int, loss: float, num_steps: int, interval_s: float) -> None:
        record: dict[str, Any] = {
            "kind": "train",
            "step": step,
            "loss": loss,
            "lr": float(self._engine.get_lr()[0]),
            "tokens_per_s": self._tokens_per_step * num_steps / interval_s,
            "step_s": interval_s / num_steps,
            "training_s": self._training_s,
        }
        grad_norm = self._engine.get_global_grad_norm()
        if grad_norm is not None:
            record["grad_norm"] = float(grad_norm)
        self._emit(record)

    def _mean_over_ranks(self, value: Tensor) -> float:
        total = value.detach().clone()
        dist.all_reduce(total)
        return float(total) / self._order.world_size

    def _emit(self, record: Record) -> None:
        for sink in self._sinks:
            sink(record)
