"""The farm: trains the members of one group side by side, on the same data, from the same weights.

Shape suffixes: M members, P elements of the parameter vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sidecast.evaluation.batches import training_batch, validation_batches
from sidecast.evaluation.corpora import Corpus
from sidecast.evaluation.gradients import AutogradGradients, Engine, Gradients, mean_losses
from sidecast.evaluation.methods.registry import make_method
from sidecast.evaluation.models.model import Model
from sidecast.evaluation.optimizers import clip_, make_optimizer
from sidecast.evaluation.read_outs import RAW, ReadOuts
from sidecast.evaluation.settings import MemberSettings
from sidecast.evaluation.spikes import SpikeMeter
from sidecast.evaluation.tasks import Task

Clock = Callable[[], float]
NUM_CURVE_POINTS = 10


def group_key(member: MemberSettings) -> tuple[Any, ...]:
    """What members of one group have in common."""
    return member.task, member.seed, member.num_steps, member.schedule, member.optimizer.name


@dataclass(frozen=True, kw_only=True)
class MemberResult:
    """What came of one member.

    Attributes:
        final_losses: Validation loss at the end by read-out; infinite where the run diverged.
        curve: Validation loss of the raw weights on the way, as (step, loss).
        worst_spike: The largest rise of the mean training loss above the lowest before it.
        method_s: Time that the method took, all in all.
        step_s: Time of all steps, without the method.
        method: What the method did.
    """

    final_losses: Mapping[str, float]
    curve: Sequence[tuple[int, float]]
    worst_spike: float
    method_s: float
    step_s: float
    method: Mapping[str, float | int | str]


class GroupRun:
    """Trains one group; may be stopped after any step, and taken up from its state.

    Args:
        task: The recipe.
        corpora: Its texts, in the order of ``task.corpora``.
        members: All of one ``group_key``.
        engine: How the arithmetic is done.
        clock: Seconds, for what methods cost; None: nothing is measured.
        gradients: Computes gradients; None: by automatic differentiation.

    Attributes:
        step: Steps taken.
        params_MP: The weights of now.
    """

    def __init__(
        self,
        task: Task,
        corpora: Sequence[Corpus],
        members: Sequence[MemberSettings],
        engine: Engine,
        *,
        clock: Clock | None = None,
        gradients: Gradients | None = None,
    ) -> None:
        assert len({group_key(member) for member in members}) == 1
        self.step = 0
        self.members = members
        self._task = task
        self._corpora = corpora
        self._engine = engine
        self._clock = clock or (lambda: 0.0)
        self._model: Model = task.model.build()
        self._gradients = gradients or AutogradGradients(self._model, engine)
        first = self._model.initial(members[0].seed).to(engine.device)
        self.params_MP = first.repeat(len(members), 1)
        self._grads_MP = torch.zeros_like(self.params_MP)
        manifest = self._model.manifest
        self._optimizer = make_optimizer([member.optimizer for member in members], manifest, self.params_MP)
        self._methods = [
            make_method(member.method, manifest, row_P) for member, row_P in zip(members, self.params_MP, strict=True)
        ]
        self._read_outs = ReadOuts(self.params_MP)
        self._spikes = [SpikeMeter(member.schedule.warmup_steps) for member in members]
        self._curve: list[tuple[int, list[float]]] = []
        self._method_s = [0.0] * len(members)
        self._step_s = 0.0

    @property
    def num_steps(self) -> int:
        """Length of the run."""
        return self.members[0].num_steps

    @property
    def is_done(self) -> bool:
        """Whether all steps are taken."""
        return self.step == self.num_steps

    def advance(self, max_steps: int) -> None:
        """Takes some steps, at most to the end of the run."""
        interval = max(1, self.num_steps // NUM_CURVE_POINTS)
        for _ in range(min(max_steps, self.num_steps - self.step)):
            self._take_step()
            if self.step % interval == 0 and not self.is_done:
                self._curve.append((self.step, self._validate(self._optimizer.read_out(self.params_MP))))

    def _take_step(self) -> None:
        started_s = self._clock()
        task, first = self._task, self.members[0]
        tokens_T = self._corpus_of(self.step).train_tokens
        batch = training_batch(tokens_T, first.seed, self.step, task.batch_size, task.sequence_length)
        tokens_BL, targets_BL = (part.to(self._engine.device) for part in batch)
        losses = self._gradients(self.params_MP, tokens_BL, targets_BL, self._grads_MP).tolist()
        clip_(self._grads_MP, [member.optimizer.max_grad_norm for member in self.members])
        lr_ratio = first.schedule.ratio(self.step, self.num_steps)
        self._optimizer.step(self.params_MP, self._grads_MP, lr_ratio)
        self.step += 1
        self._step_s += self._clock() - started_s
        for row, method in enumerate(self._methods):
            started_s = self._clock()
            lr = self.members[row].optimizer.lr * lr_ratio
            method.after_step(self.step, self.params_MP[row], lr, losses[row])
            self._method_s[row] += self._clock() - started_s
            self._spikes[row].observe(self.step, losses[row])
        self._read_outs.after_step(self.step, self.params_MP)

    def results(self) -> list[MemberResult]:
        """What came of the members, in their order; the run must be done."""
        assert self.is_done
        losses = {RAW: self._validate(self._optimizer.read_out(self.params_MP))}
        losses |= {name: self._validate(average_MP) for name, average_MP in self._read_outs.weights().items()}
        return [
            MemberResult(
                final_losses={name: values[row] for name, values in losses.items()},
                curve=[*((step, values[row]) for step, values in self._curve), (self.step, losses[RAW][row])],
                worst_spike=self._spikes[row].worst,
                method_s=self._method_s[row],
                step_s=self._step_s / len(self.members),
                method=self._methods[row].report(),
            )
            for row in range(len(self.members))
        ]

    def _corpus_of(self, step: int) -> Corpus:
        """What the step after so many steps reads."""
        change = self._task.change
        return self._corpora[0 if change is None or step < change.step else 1]

    def _validate(self, params_MP: Tensor) -> list[float]:
        task = self._task
        # Of the text that was read last.
        tokens_T = self._corpus_of(self.step - 1).validation_tokens
        batches = validation_batches(tokens_T, task.num_validation_sequences, task.batch_size, task.sequence_length)
        on_device = [(tokens.to(self._engine.device), targets.to(self._engine.device)) for tokens, targets in batches]
        losses = mean_losses(self._gradients, params_MP, on_device)
        return [loss if math.isfinite(loss) else math.inf for loss in losses]

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, from which a run goes on bit for bit."""
        return {
            "step": self.step,
            "params": self.params_MP,
            "optimizer": self._optimizer.state(),
            "methods": [method.state() for method in self._methods],
            "read_outs": self._read_outs.state(),
            "spikes": [meter.state() for meter in self._spikes],
            "curve": self._curve,
            "seconds": [self._step_s, *self._method_s],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""
        self.step = int(state["step"])
        self.params_MP.copy_(state["params"])
        self._optimizer.load(state["optimizer"])
        for method, saved in zip(self._methods, state["methods"], strict=True):
            method.load(saved)
        self._read_outs.load(state["read_outs"])
        for meter, saved in zip(self._spikes, state["spikes"], strict=True):
            meter.load(saved)
        self._curve = [(int(step), list(losses)) for step, losses in state["curve"]]
        self._step_s, *self._method_s = state["seconds"]
