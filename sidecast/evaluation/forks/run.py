"""A run at a constant learning rate, decays that are forked from it, and its read-outs, all on the same data.

Every decay goes on from the run's own state, moments included, and ends at the step at which it is judged: so it has
seen what the read-outs have seen. It is, bit for bit, the end of a run that was planned with that decay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sidecast.evaluation.batches import probe_batches, validation_batches
from sidecast.evaluation.corpora import Corpus
from sidecast.evaluation.farm import GroupRun
from sidecast.evaluation.forks.settings import INTERVAL_STEPS, ForkSettings
from sidecast.evaluation.gradients import AutogradGradients, Engine, Gradients, mean_losses
from sidecast.evaluation.read_outs import RAW
from sidecast.evaluation.tasks import Task
from sidecast.policies.read_outs import ReadOut

Losses = tuple[float, float]
"""On the probe, by which a read-out is chosen, and on the held-out text, by which all are judged."""
Progress = Callable[[int], None]


class Average:
    """One read-out of a run; its states are those of every ``INTERVAL_STEPS`` steps.

    Args:
        read_out: Which.
    """

    def __init__(self, read_out: ReadOut) -> None:
        self._read_out = read_out
        self._step = read_out.start_step
        self.values_MP: Tensor | None = None

    def fold(self, step: int, params_MP: Tensor) -> None:
        """Averages a state in."""
        start = self._read_out.start_step
        if step <= start:
            return
        share = self._read_out.share(start, self._step, step)
        self.values_MP = params_MP.clone() if self.values_MP is None else self.values_MP.lerp(params_MP, share)
        self._step = step


class ForkedRun:
    """Trains one run with its forks.

    Args:
        task: The recipe.
        corpora: Its texts.
        settings: What is asked for.
        engine: How the arithmetic is done.
        gradients: Computes gradients; None: by automatic differentiation.
        progress: Called with the number of steps since the last call.
    """

    def __init__(
        self,
        task: Task,
        corpora: Sequence[Corpus],
        settings: ForkSettings,
        engine: Engine,
        gradients: Gradients | None = None,
        progress: Progress = lambda num_steps: None,
    ) -> None:
        self._task, self._corpora, self._settings, self._engine = task, corpora, settings, engine
        self._gradients = gradients or AutogradGradients(task.model.build(), engine)
        self._progress = progress
        tokens_T = corpora[0].validation_tokens
        sizes = (task.num_validation_sequences, task.batch_size, task.sequence_length)
        self._texts = (probe_batches(tokens_T, *sizes), validation_batches(tokens_T, *sizes))
        self._run = self._group(settings.member.schedule, settings.member.num_steps)
        # By the step at which they are judged.
        self._averages = {
            step: {name: Average(read_out) for name, read_out in settings.read_outs(step).items()}
            for step in settings.checkpoints
        }

    def losses(self) -> dict[int, dict[str, Losses]]:
        """Losses by step, and by name: ``raw``, a read-out, or a decay; infinite where it diverged."""
        settings = self._settings
        starts = {decay.start(step) for step in settings.checkpoints for decay in settings.decays}
        states: dict[int, Any] = {}
        found = {}
        ticks = range(INTERVAL_STEPS, settings.member.num_steps + 1, INTERVAL_STEPS)
        for stop in sorted({*starts, *settings.checkpoints, *ticks}):
            self._advance(self._run, stop)
            if stop in starts:
                states[stop] = copy.deepcopy(self._run.state())
            if stop % INTERVAL_STEPS == 0:
                for step, averages in self._averages.items():
                    for average in averages.values() if stop <= step else ():
                        average.fold(stop, self._run.params_MP)
            if stop in settings.checkpoints:
                found[stop] = self._judged(stop, states)
        return found

    def _judged(self, step: int, states: Mapping[int, Any]) -> dict[str, Losses]:
        found = {RAW: self._losses(self._run.params_MP)}
        for name, average in self._averages[step].items():
            if average.values_MP is not None:
                found[name] = self._losses(average.values_MP)
        for decay in self._settings.decays:
            fork = self._group(decay.schedule(self._settings.member.schedule.warmup_steps), step)
            fork.load(states[decay.start(step)])
            self._advance(fork, step)
            found[decay.name] = self._losses(fork.params_MP)
        return found

    def _group(self, schedule: Any, num_steps: int) -> GroupRun:
        member = replace(self._settings.member, schedule=schedule, num_steps=num_steps)
        return GroupRun(self._task, self._corpora, [member], self._engine, gradients=self._gradients)

    def _advance(self, run: GroupRun, stop: int) -> None:
        num_steps = stop - run.step
        run.advance(num_steps)
        self._progress(num_steps)

    @torch.no_grad()
    def _losses(self, params_MP: Tensor) -> Losses:
        probe, held_out = (mean_losses(self._gradients, params_MP, text)[0] for text in self._texts)
        return _or_infinite(probe), _or_infinite(held_out)


def _or_infinite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
