"""Every predictor's work can be divided, on any model, and the workers' shares add up to the whole."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.engine_pool import PassWorker, Task, total_of
from sidecast.nowcaster_service.vector_files import HistoryFiles, map_vector
from sidecast.predictors import passes, tensor_parts, wnn
from sidecast.predictors.base import History
from sidecast.predictors.passes import (
    Part,
    PartContext,
    PassPlan,
    PassPredictor,
    WritingPass,
    divide_parts,
    predict_in_passes,
    run_pass,
)
from sidecast.predictors.registry import create_predictor
from sidecast.predictors.tensor_parts import split_tensors
from sidecast.predictors.wnn import WnnConfig, WnnNetwork
from tests.support.limits import HANG_S

UNKNOWN = ModelManifest.from_shapes([("a", [9, 7]), ("empty", [0]), ("b", [1]), ("c", [2, 3, 3, 3]), ("d", [31])])


def history() -> History:
    generator = torch.Generator().manual_seed(0)
    return History(UNKNOWN, [torch.randn(UNKNOWN.num_elements, generator=generator) for _ in range(5)])


def predictor(name: str, folder: Path) -> PassPredictor:
    weights = None
    if name == "wnn":
        torch.manual_seed(0)
        weights = folder / "wnn.safetensors"
        save_file(WnnNetwork(WnnConfig(max_horizon=4, hidden_dim=8)).state_dict(), weights)
    made = create_predictor(name, weights=weights)
    assert isinstance(made, PassPredictor)
    return made


def divided(made: PassPredictor, states: History, num_workers: int, folder: Path, *, num_threads: int = 1) -> Tensor:
    """As the pool does it, without Ray."""
    paths = tuple(folder / f"state{index}" for index in range(states.context_len))
    for path, state in zip(paths, states.states, strict=True):
        state.numpy().tofile(path)
    files = HistoryFiles(manifest=states.manifest, paths=paths)
    out_path = folder / "delta"
    torch.full((states.manifest.num_elements,), torch.nan).numpy().tofile(out_path)
    workers = [PassWorker(made, num_threads=num_threads) for _ in range(num_workers)]
    for index, worker in enumerate(workers):
        task = Task(files=files, horizon_intervals=3, out_path=out_path, worker=index, num_workers=num_workers)
        num_passes = worker.begin(task)
    total = None
    for pass_index in range(num_passes):
        total = total_of([worker.run(pass_index, total) for worker in workers])
    return map_vector(out_path, states.manifest, torch.float32)


@pytest.mark.parametrize("name", ["linear", "average", "outer_nesterov", "rank1", "wnn"])
@pytest.mark.parametrize("num_workers", [1, 2, 7])
def test_shares_add_up(name: str, num_workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = predictor(name, tmp_path)
    whole = torch.empty(UNKNOWN.num_elements)
    made.predict(history(), 3, whole)
    monkeypatch.setattr(tensor_parts, "MAX_ELEMENTS", 10)
    monkeypatch.setattr(wnn, "PART_ELEMENTS", 10)
    torch.testing.assert_close(divided(made, history(), num_workers, tmp_path), whole, rtol=1e-5, atol=1e-6)


def test_parts_cover_every_element_once_and_are_shared_evenly() -> None:
    parts = split_tensors(UNKNOWN, 10)
    covered = torch.zeros(UNKNOWN.num_elements)
    for part in parts:
        assert part.num_scalars <= 10
        for piece in part.read([covered], UNKNOWN.offsets[part.fqn]):
            piece += 1
    assert torch.equal(covered, torch.ones_like(covered))
    loads = [sum(part.num_scalars for part in share) for share in divide_parts(parts, 3)]
    assert sum(loads) == UNKNOWN.num_elements
    assert max(loads) - min(loads) <= 10


class MadeParts(Sequence[Part]):
    """Parts that are made when they are asked for.

    Attributes:
        made: Indices of those that were made, in this order.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.made: list[int] = []
        self._parts = parts

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: Any) -> Any:
        part = self._parts[index]
        self.made.append(index)
        return part


def test_shares_make_their_parts_when_they_are_asked_for() -> None:
    parts = split_tensors(UNKNOWN, 10)
    made_parts = MadeParts(parts)
    shares = divide_parts(made_parts, 3)
    made_parts.made.clear()
    assert [len(share) for share in shares] == [len(share[:]) for share in shares]
    assert made_parts.made == []
    for share in shares:
        assert list(share) == [parts[index] for index in made_parts.made]
        assert made_parts.made == sorted(made_parts.made)
        assert len(made_parts.made) == len(share)
        made_parts.made.clear()
        assert share[-1] == list(share)[-1]
        assert list(share[1:]) == list(share)[1:]
        assert list(share[::-1]) == list(reversed(share)) == list(share)[::-1]
        with pytest.raises(IndexError):
            share[len(share)]
        made_parts.made.clear()
    assert sorted(index for share in shares for index in map(parts.index, share)) == list(range(len(parts)))


def test_workers_without_parts_have_an_empty_share() -> None:
    parts = split_tensors(UNKNOWN, 1000)
    assert sorted(len(share) for share in divide_parts(parts, len(parts) + 2)) == [0, 0] + [1] * len(parts)


@pytest.mark.parametrize(
    ("max_threads", "num_at_hand", "num_used"), [(None, 3, 3), (8, 3, 3), (2, 3, 2), (3, 3, 3), (1, 1, 1)]
)
def test_a_plan_uses_no_more_threads_than_it_may_and_has(
    max_threads: int | None, num_at_hand: int, num_used: int
) -> None:
    plan: PassPlan[Part] = PassPlan([], [], max_threads)
    assert plan.num_threads(num_at_hand) == num_used


@pytest.mark.parametrize(("max_threads", "num_used"), [(None, 2), (8, 2), (1, 1)])
def test_no_worker_uses_more_threads_than_it_was_given(
    max_threads: int | None, num_used: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    mapped = passes.ordered_map

    def noting(function: Any, arguments: Any, num_threads: int) -> Any:
        used.append(num_threads)
        return mapped(function, arguments, num_threads)

    made = predictor("linear", tmp_path)
    plan = replace(made.plan(UNKNOWN, 3), max_threads=max_threads)
    monkeypatch.setattr(made, "plan", lambda *_: plan)
    monkeypatch.setattr(passes, "ordered_map", noting)
    divided(made, history(), 1, tmp_path, num_threads=2)
    predict_in_passes(made, history(), 3, torch.empty(UNKNOWN.num_elements), num_threads=2)
    assert used == [num_used] * (2 * len(plan.passes))


def test_large_tensors_are_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = ModelManifest.from_shapes([("large", [1 << 16])])
    states = [torch.randn(1 << 16) for _ in range(5)]
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in inputs:
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(tensor_parts, "MAX_ELEMENTS", 1 << 10)
    out = torch.empty(1 << 16)
    inputs = {tensor.untyped_storage().data_ptr() for tensor in [*states, out]}
    for name in ("linear", "average", "outer_nesterov", "rank1"):
        with Watch():
            create_predictor(name).predict(History(manifest, states), 2, out)
    assert 1 << 10 <= largest <= 5 << 10


class ModePass(WritingPass):
    """Notes in which mode parts are worked on."""

    def __init__(self) -> None:
        self.are_inferences: list[bool] = []

    def map(self, part: Part, context: PartContext) -> None:
        self.are_inferences.append(torch.is_inference_mode_enabled())


@pytest.mark.parametrize("num_threads", [1, 3])
def test_no_thread_records_gradients(num_threads: int) -> None:
    noting, parts = ModePass(), split_tensors(UNKNOWN, 10)
    run_pass(noting, parts, PartContext(UNKNOWN, [], {}, torch.empty(0)), num_threads)
    assert noting.are_inferences == [True] * len(parts)
    assert not torch.is_inference_mode_enabled()


class FailingPass(ModePass):
    """Has sums to which nothing can be added; only the first part is done before a test lets the others go on."""

    def __init__(self, first: Part) -> None:
        super().__init__()
        self.may_go_on = threading.Event()
        self._first = first

    def zeros(self, context: PartContext) -> Any:
        return torch.zeros(1)

    def map(self, part: Part, context: PartContext) -> Any:
        super().map(part, context)
        if part is not self._first:
            assert self.may_go_on.wait(HANG_S)
        return torch.ones(1)

    def add(self, part: Part, contribution: Tensor, sums: Tensor) -> None:
        raise ArithmeticError("too much")


def test_sums_that_fail_leave_undone_what_has_not_begun_and_torchs_threads_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts = split_tensors(UNKNOWN, 1)
    failing = FailingPass(parts[0])
    num_ahead = 2 * passes._LOOKAHEAD
    assert len(parts) > num_ahead
    are_cancelled: list[bool] = []
    cancel = Future.cancel

    def cancelling(future: Future[Any]) -> bool:
        are_cancelled.append(cancel(future))
        if len(are_cancelled) == num_ahead - 1:
            failing.may_go_on.set()
        return are_cancelled[-1]

    monkeypatch.setattr(Future, "cancel", cancelling)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        # Kept, because an error holds the frames that it came through: what they hold must end all the same.
        with pytest.raises(ArithmeticError, match="too much") as error:
            run_pass(failing, parts, PartContext(UNKNOWN, [], {}, torch.empty(0)), 2)
        assert are_cancelled.count(True) >= num_ahead - 3
        assert len(failing.are_inferences) <= 3
        with ThreadPoolExecutor(1) as thread:
            assert (torch.get_num_threads(), thread.submit(torch.get_num_threads).result()) == (3, 3)
        del error
    finally:
        failing.may_go_on.set()
        torch.set_num_threads(before)
