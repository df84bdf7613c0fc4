"""Predictions as a list of passes over the parts of a model or of its graph, on one thread or many.

A pass maps every part, given what earlier passes found, and sums what the parts contribute. The sums are
associative, so that parts may be divided over threads or machines.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar, overload, runtime_checkable

import torch
from torch import Tensor

from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History, Predictor, check_history
from sidecast.predictors.workspace import MemoryWorkspace, Workspace

_LOOKAHEAD = 16
"""Parts for each thread that may be begun before the oldest one is done: enough for one slow part beside many quick
ones, and few enough that what is kept for them does not grow with the model."""

Found = Mapping[str, Tensor]
"""What the passes so far have found, by name: scales of the parameters, states of the nodes."""


@dataclass(frozen=True)
class PartContext:
    """What a pass reads and writes while it works on parts.

    Attributes:
        manifest: Where each parameter is in the states.
        states: C parameter vectors, newest last.
        found: Results of earlier passes.
        out: The predicted change, which the last pass writes.
        workspace: Where sums for each node are kept, if the work is done on a CPU.
    """

    manifest: ModelManifest
    states: Sequence[Tensor]
    found: Found
    out: Tensor
    workspace: Workspace = field(default_factory=MemoryWorkspace)


class Part(Protocol):
    """Some scalars that are worked on together, few enough for a processor's memory."""

    @property
    def fqn(self) -> str | None:
        """The parameter that they belong to; None for the constants of a graph's structure."""
        ...

    @property
    def num_scalars(self) -> int:
        """How many. What the part costs."""
        ...

    def read(self, states: Sequence[Tensor], parameter_start: int) -> list[Tensor]:
        """They in each of C parameter vectors, as views where they lie evenly.

        Args:
            states: The vectors.
            parameter_start: Where the parameter begins in them.
        """
        ...


PartT = TypeVar("PartT", bound=Part)
PartContraT = TypeVar("PartContraT", bound=Part, contravariant=True)


class BlockPass(Protocol[PartContraT]):
    """One pass over all parts."""

    def zeros(self, context: PartContext) -> Tensor | None:
        """A sum of no contributions; None if the pass writes its result and sums nothing."""
        ...

    def map(self, part: PartContraT, context: PartContext) -> Tensor | None:
        """Works on one part; may run on several threads at once. Returns its contribution."""
        ...

    def add(self, part: PartContraT, contribution: Tensor, sums: Tensor) -> None:
        """Adds a contribution to the sums, in place."""
        ...

    def finish(self, sums: Tensor, context: PartContext) -> Found:
        """What follows from the sums of all parts; takes the place of ``context.found``."""
        ...


class WritingPass:
    """What passes have in common that write their result and sum nothing."""

    def zeros(self, context: PartContext) -> None:
        return None

    def add(self, part: Part, contribution: Tensor, sums: Tensor) -> None:
        raise AssertionError("this pass has no sums")

    def finish(self, sums: Tensor, context: PartContext) -> Found:
        raise AssertionError("this pass has no sums")


@dataclass(frozen=True)
class PassPlan(Generic[PartT]):
    """How to predict: every pass over all parts, in this order.

    Attributes:
        parts: All parts of the model.
        passes: All passes.
        max_threads: Parts that may be worked on at the same time; None for as many as there are threads at hand.
    """

    parts: Sequence[PartT]
    passes: Sequence[BlockPass[PartT]]
    max_threads: int | None = None

    def num_threads(self, num_at_hand: int) -> int:
        """How many of the threads at hand to use."""
        return num_at_hand if self.max_threads is None else min(num_at_hand, self.max_threads)


@runtime_checkable
class PassPredictor(Predictor, Protocol):
    """A predictor whose work can be divided."""

    def plan(self, manifest: ModelManifest, horizon_intervals: int) -> PassPlan[Any]:
        """The same plan for the same model and horizon, on every machine."""
        ...


Result = TypeVar("Result")
Argument = TypeVar("Argument")


def ordered_map(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], num_threads: int
) -> Generator[Result, None, None]:
    """Maps on several threads, each with single-threaded operators; results come in the order of the arguments."""
    if num_threads == 1:
        yield from map(function, arguments)
        return
    intra_op_threads = torch.get_num_threads()
    waiting: deque[Future[Result]] = deque()
    try:
        with ThreadPoolExecutor(num_threads, "sidecast-pass", initializer=lambda: torch.set_num_threads(1)) as pool:
            try:
                for argument in arguments:
                    waiting.append(pool.submit(function, argument))
                    if len(waiting) == _LOOKAHEAD * num_threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()
    finally:
        # Once all of them have set theirs: the number is also the default for threads that start later, in the host's
        # code too.
        torch.set_num_threads(intra_op_threads)


def run_pass(
    block_pass: BlockPass[PartT], parts: Sequence[PartT], context: PartContext, num_threads: int
) -> Tensor | None:
    """One pass over some parts; returns their sums. The order of summation does not depend on the threads."""
    sums = block_pass.zeros(context)
    # Torch keeps the mode for each thread.
    work = torch.inference_mode()(lambda part: block_pass.map(part, context))
    with closing(ordered_map(work, parts, num_threads)) as contributions:
        for part, contribution in zip(parts, contributions, strict=True):
            if sums is not None and contribution is not None:
                block_pass.add(part, contribution, sums)
            context.workspace.trim()
    return sums


def run_plan(
    plan: PassPlan[PartT], history: History, out: Tensor, num_threads: int, workspace: Workspace | None = None
) -> None:
    """Runs a plan in this process."""
    workspace = MemoryWorkspace() if workspace is None else workspace
    context = PartContext(history.manifest, history.states, {}, out, workspace)
    for block_pass in plan.passes:
        sums = run_pass(block_pass, plan.parts, context, plan.num_threads(num_threads))
        if sums is not None:
            context = replace(context, found=block_pass.finish(sums, context))


def predict_in_passes(
    predictor: PassPredictor,
    history: History,
    horizon_intervals: int,
    out: Tensor,
    *,
    num_threads: int = 1,
    workspace: Workspace | None = None,
) -> None:
    """``Predictor.predict`` of any predictor that has a plan.

    Args:
        predictor: Makes the plan.
        history: C states of P elements, oldest first.
        horizon_intervals: How far ahead to predict, k, in snapshot intervals.
        out: Receives the predicted change since the newest state, (P,) fp32.
        num_threads: Threads at hand for parts; one leaves them to torch's operators.
        workspace: Where sums for each node are kept; in memory if None.
    """
    check_history(predictor, history, horizon_intervals)
    with torch.inference_mode():
        run_plan(predictor.plan(history.manifest, horizon_intervals), history, out, num_threads, workspace)


class Share(Sequence[PartT]):
    """Some of the parts, in their order; made when they are asked for, if the parts are.

    Args:
        parts: All parts of the model.
        indices: Which of them are in this share, ascending.
    """

    def __init__(self, parts: Sequence[PartT], indices: Sequence[int]) -> None:
        self._parts = parts
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> PartT: ...

    @overload
    def __getitem__(self, index: slice) -> Share[PartT]: ...

    def __getitem__(self, index: int | slice) -> PartT | Share[PartT]:
        if isinstance(index, slice):
            return Share(self._parts, self._indices[index])
        return self._parts[self._indices[index]]


def divide_parts(parts: Sequence[PartT], num_workers: int) -> list[Share[PartT]]:
    """Divides parts among workers by cost, the largest first to the least loaded; each share keeps the parts' order."""
    loads = [0] * num_workers
    shares = [array("q") for _ in range(num_workers)]
    costs = [part.num_scalars for part in parts]
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        worker = loads.index(min(loads))
        loads[worker] += costs[index]
        shares[worker].append(index)
    return [Share(parts, array("q", sorted(share))) for share in shares]
