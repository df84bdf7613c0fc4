"""How fast NiNo is on a GPU: Llama shapes, random states that are on the device, against its measured bf16 rate.

Prints one JSON line for each step: the device, how near less precise products come to the CPU's fp32, the rate of
``torch.mm`` in bf16, and for each model the seconds of a nowcast, of its passes, and its share of that rate. Without a
file, weights are random: they cost the same.

    python -m benchmarks.bench_nino_gpu                                   (an H200, or what it says of another GPU)
    python -m benchmarks.bench_nino_gpu --cases 8B --precisions bf16 tf32
    python -m benchmarks.bench_nino_gpu --tiny                            (no GPU: a tiny model in Triton's interpreter)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.llama_sizes import LLAMA_SIZES, LlamaSize
from benchmarks.nino_cases import random_weights
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History
from sidecast.predictors.nino.graph_cache import GraphCache
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import NinoWeights, load_weights
from sidecast.predictors.passes import PartContext, run_pass

HORIZON_INTERVALS = 20
FLOPS_PER_PARAMETER = 102_000
"""Three products of 128 x 128 for each parameter, and little else: nino-spec's floor."""
CHUNK_ELEMENTS = 1 << 28
TINY = LlamaSize(hidden=12, inner=20, num_layers=1, num_heads=2, num_kv_heads=1, vocab_size=26, is_tied=True)
"""Widths that divide no tile."""


def resident_history(manifest: ModelManifest, device: torch.device, num_states: int) -> History:
    """A random walk in bf16, made on the device chunk by chunk."""
    generator = torch.Generator(device).manual_seed(0)
    states: list[Tensor] = []
    for index in range(num_states):
        state = torch.empty(manifest.num_elements, dtype=torch.bfloat16, device=device)
        for start in range(0, manifest.num_elements, CHUNK_ELEMENTS):
            chunk = state[start : start + CHUNK_ELEMENTS]
            chunk.normal_(std=0.05 if index == 0 else 0.002, generator=generator)
            if index > 0:
                chunk += states[-1][start : start + CHUNK_ELEMENTS]
        states.append(state)
    return History(manifest, states)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of one call, with everything that it started on the device."""
    _synchronize(device)
    started_s = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - started_s


def matmul_rate(device: torch.device, side: int) -> float:
    """FLOP per second of ``torch.mm`` on random bf16 matrices, the best of several trials."""
    left, right = torch.randn(2, side, side, device=device).bfloat16()
    repeats = 20 if side >= 4096 else 1

    def multiply() -> None:
        for _ in range(repeats):
            torch.mm(left, right)

    multiply()
    return 2 * side**3 * repeats / min(seconds(multiply, device) for _ in range(5))


def pass_seconds(predictor: NinoPredictor, history: History, out: Tensor, device: torch.device) -> dict[str, float]:
    """One nowcast, pass by pass; the plan counts as one."""
    times: dict[str, float] = {}
    started_s = time.perf_counter()
    with torch.inference_mode():
        plan = predictor.plan(history.manifest, HORIZON_INTERVALS)
        _synchronize(device)
        times["plan"] = time.perf_counter() - started_s
        context = PartContext(history.manifest, history.states, {}, out)
        for index, block_pass in enumerate(plan.passes):
            started_s = time.perf_counter()
            sums = run_pass(block_pass, plan.parts, context, 1)
            if sums is not None:
                context = replace(context, found=block_pass.finish(sums, context))
            _synchronize(device)
            times[f"{index}_{type(block_pass).__name__}"] = time.perf_counter() - started_s
    return {name: round(value, 4) for name, value in times.items()}


def run_case(
    name: str, size: LlamaSize, weights: NinoWeights, device: torch.device, precision: str, trials: int, rate: float
) -> dict[str, Any]:
    """Times nowcasts of one model."""
    manifest = size.manifest()
    graphs = GraphCache()
    predictor = make_predictor(weights, graphs, device, precision)
    # Graph and encoding are made once for each model and kept, and kernels compile once.
    prepare_s = seconds(lambda: predictor.prepare(manifest), device)
    history = resident_history(manifest, device, weights.config.context_len)
    out = torch.empty(manifest.num_elements, device=device)
    first_s = seconds(lambda: predictor.predict(history, HORIZON_INTERVALS, out), device)
    times = [seconds(lambda: predictor.predict(history, HORIZON_INTERVALS, out), device) for _ in range(trials)]
    nowcast_s = statistics.median(times)
    return {
        "case": name,
        "num_parameters": manifest.num_elements,
        "precision": precision,
        "prepare_s": round(prepare_s, 3),
        "first_s": round(first_s, 3),
        "nowcast_s": round(nowcast_s, 4),
        "spread_s": [round(min(times), 4), round(max(times), 4)],
        "share_of_matmul_rate": round(FLOPS_PER_PARAMETER * manifest.num_elements / nowcast_s / rate, 4),
        "passes_s": pass_seconds(predictor, history, out, device),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 1) if device.type == "cuda" else None,
        "finite": bool(out.isfinite().all()) if manifest.num_elements < CHUNK_ELEMENTS else None,
    }


def compare(
    size: LlamaSize, weights: NinoWeights, device: torch.device, precisions: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Mean and largest error of each precision, in shares of the mean change that the CPU predicts in fp32."""
    manifest = size.manifest()
    history = resident_history(manifest, torch.device("cpu"), weights.config.context_len)
    exact, found = torch.empty(2, manifest.num_elements)
    graphs = GraphCache()
    NinoPredictor(weights, graphs=graphs).predict(history, HORIZON_INTERVALS, exact)
    shares = {}
    for precision in precisions:
        make_predictor(weights, graphs, device, precision).predict(history, HORIZON_INTERVALS, found)
        error = (found - exact).abs() / exact.abs().mean()
        shares[precision] = {"mean": float(error.mean()), "largest": float(error.max())}
    return shares


def make_predictor(weights: NinoWeights, graphs: GraphCache, device: torch.device, precision: str) -> NinoPredictor:
    """The predictor with GPU kernels; without a GPU they run in Triton's interpreter."""
    if device.type == "cuda":
        return NinoPredictor(weights, graphs=graphs, device=str(device), precision=precision)
    from sidecast.predictors.nino.backend import triton_backend

    backend = triton_backend(device, precision, weights.config.context_len)
    return NinoPredictor(weights, graphs=graphs, backend=backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="NiNo weights; random ones by default")
    parser.add_argument("--cases", nargs="+", choices=sorted(LLAMA_SIZES), default=["1B", "8B"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "tf32", "bf16"], default=["bf16"])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, in Triton's interpreter")
    arguments = parser.parse_args()
    if arguments.tiny:
        # Triton reads it when it is first imported, which is later.
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device; --tiny runs a tiny model in Triton's interpreter")
    device = torch.device("cpu") if arguments.tiny else torch.device("cuda", 0)
    sizes = {"tiny": TINY} if arguments.tiny else {name: LLAMA_SIZES[name] for name in arguments.cases}
    weights = random_weights() if arguments.weights is None else load_weights(arguments.weights)
    name = "CPU" if arguments.tiny else torch.cuda.get_device_name(device)
    _report({"device": name, "torch": torch.__version__})
    check = TINY if arguments.tiny else LLAMA_SIZES["400K"]
    _report({"error_share": compare(check, weights, device, ["fp32", "tf32", "bf16"])})
    rate = matmul_rate(device, 256 if arguments.tiny else 8192)
    _report({"matmul_tflops": rate / 1e12})
    for name, size in sizes.items():
        for precision in arguments.precisions:
            _report(run_case(name, size, weights, device, precision, arguments.trials, rate))
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)


def _report(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
