"""Every predictor's work can be divided, on any model, and the workers' shares add up to the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.engine import PassWorker, Task, total_of
from sidecast.nowcaster_service.vector_files import HistoryFiles, map_vector
from sidecast.predictors import tensor_parts, wnn
from sidecast.predictors.base import History
from sidecast.predictors.passes import Part, PartContext, PassPredictor, WritingPass, divide_parts, run_pass
from sidecast.predictors.registry import create_predictor
from sidecast.predictors.tensor_parts import split_tensors
from sidecast.predictors.wnn import WnnConfig, WnnNetwork

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


def divided(made: PassPredictor, states: History, num_workers: int, folder: Path) -> Tensor:
    """As the pool does it, without Ray."""
    paths = tuple(folder / f"state{index}" for index in range(states.context_len))
    for path, state in zip(paths, states.states, strict=True):
        state.numpy().tofile(path)
    files = HistoryFiles(manifest=states.manifest, paths=paths)
    out_path = folder / "delta"
    torch.full((states.manifest.num_elements,), torch.nan).numpy().tofile(out_path)
    workers = [PassWorker(made, num_threads=1) for _ in range(num_workers)]
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
