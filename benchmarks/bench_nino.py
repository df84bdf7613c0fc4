"""How fast and how lean the fused NiNo predictor is, against the plain module in the same run.

    python -m benchmarks.bench_nino [--weights nino_no_posw.pt] --preset small | full | real
    python -m benchmarks.bench_nino --here

Without a file, weights are random: they cost the same. Prints one JSON line for each measurement and a summary of
ratios. Every case runs in a process of its own, one after another, the fused one before and after the plain one; bf16
products only where the processor has them. ``--here`` says which loops this processor can run, which of them
a nowcast takes, and what each reaches, in a minute.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.nino_cases import SHAPES, measure, random_history, random_weights
from sidecast.predictors.base import Predictor
from sidecast.predictors.nino.compiled import CompiledKernels, cpu_kernels
from sidecast.predictors.nino.fusion import Affine
from sidecast.predictors.nino.graph_cache import GraphCache
from sidecast.predictors.nino.kernels import CpuKernels, Kernels, Layer
from sidecast.predictors.nino.loops import TORCH_LOOPS, compiled_loops
from sidecast.predictors.nino.plain import PlainNinoPredictor
from sidecast.predictors.nino.predictor import NinoPredictor
from sidecast.predictors.nino.weights import load_weights

HORIZON_INTERVALS = 20
HIDDEN_DIM = 128
# A nowcast that takes less is repeated: single seconds say little on a machine that is shared.
MIN_TRIALS_S = 10.0
MAX_TRIALS = 5
FLOPS_PER_PARAMETER = 3 * 2 * HIDDEN_DIM**2 + 2 * 2 * 5 * HIDDEN_DIM + 2 * 5 * 9 + 2 * HIDDEN_DIM
PRESETS = {
    "small": {"compare": ["0.2M"], "scale": ["0.2M", "1M"]},
    "full": {"compare": ["1M", "2M"], "scale": ["1M", "10M", "100M"]},
    "real": {"compare": [], "scale": ["SmolLM2-135M"]},
}


def matmul_rate(num_threads: int, tile_edges: int = 1024, repeats: int = 200) -> tuple[float, float]:
    """What ``torch.mm`` with 128-wide operands reaches on that many threads with a tile each.

    Returns:
        FLOP per wall second, of all threads together, and FLOP per CPU second.
    """
    weight = torch.randn(HIDDEN_DIM, HIDDEN_DIM)

    def multiply(_: int) -> None:
        torch.set_num_threads(1)
        tile, out = torch.randn(tile_edges, HIDDEN_DIM), torch.empty(tile_edges, HIDDEN_DIM)
        for _ in range(repeats):
            torch.mm(tile, weight, out=out)

    rates = []
    flops = 2 * HIDDEN_DIM**2 * tile_edges * repeats * num_threads
    with ThreadPoolExecutor(num_threads) as pool:
        for _ in range(6):
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            list(pool.map(multiply, range(num_threads)))
            rates.append((flops / (time.perf_counter() - wall_s), flops / (time.process_time() - cpu_s)))
    return max(rate[0] for rate in rates), max(rate[1] for rate in rates)


def taken_loops(precision: str) -> str:
    """The loops that a nowcast takes here, without a setting that forces others."""
    kernels = cpu_kernels(precision, "auto", HIDDEN_DIM)
    return kernels.loops.name if isinstance(kernels, CompiledKernels) else TORCH_LOOPS


def loop_seconds(kernels: Kernels, num_targets: int = 16, num_sources: int = 128, num_trials: int = 200) -> float:
    """The least time that both loops of a nowcast take for one parameter, on one core.

    Each trial is short, so that on a machine that is shared some are undisturbed.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    layers = [
        Layer(randn(inputs, HIDDEN_DIM), randn(num_sources, HIDDEN_DIM), randn(num_targets, HIDDEN_DIM))
        for inputs in (5, HIDDEN_DIM)
    ]
    layers.append(Layer(randn(HIDDEN_DIM, HIDDEN_DIM), None, randn(1, HIDDEN_DIM)))
    scale, gain, output = randn(HIDDEN_DIM, HIDDEN_DIM), randn(num_sources, HIDDEN_DIM), randn(HIDDEN_DIM, 1)
    features = randn(5, num_targets, num_sources)

    def trial() -> float:
        started = time.perf_counter()
        kernels.message_sums(features, layers[:1], scale, gain)
        kernels.changes(features, layers, Affine(output, torch.zeros(1)))
        return time.perf_counter() - started

    return min(trial() for _ in range(num_trials)) / (num_targets * num_sources)


def report_here() -> None:
    """Prints which loops this processor runs, which of them a nowcast takes, and what each reaches on one core."""
    torch.set_num_threads(1)
    rate = matmul_rate(1, repeats=4)[0]
    here = {name: CompiledKernels(loops) for name, loops in compiled_loops().items()}
    taken = {precision: taken_loops(precision) for precision in ("fp32", "bf16", "auto")}
    print(json.dumps({**_machine(), "taken": taken, "matmul_gflops_of_one_core": round(rate / 1e9)}))
    for name, kernels in {**here, TORCH_LOOPS: CpuKernels()}.items():
        seconds = loop_seconds(kernels)
        precision = str(here[name].loops.kind.dtype if name in here else torch.float32).removeprefix("torch.")
        reached = {
            "loops": name,
            "products": precision,
            "us_per_parameter_and_core": round(seconds * 1e6, 3),
            "share_of_matmul_rate": round(FLOPS_PER_PARAMETER / seconds / rate, 2),
        }
        print(json.dumps(reached), flush=True)


def _machine() -> dict[str, Any]:
    processor = torch.cpu.get_capabilities()
    return {
        "machine": processor.get("cpu_name") or platform.machine(),
        "torch": torch.__version__,
        "loops": [*compiled_loops(), TORCH_LOOPS],
    }


def run_case(kind: str, size: str, weights_path: Path | None, num_threads: int) -> dict[str, Any]:
    """Nowcasts in this process, after one of a small model to warm up: medians of time, the most memory of any."""
    torch.set_num_threads(num_threads)
    weights = random_weights() if weights_path is None else load_weights(weights_path)
    graphs = GraphCache()
    predictor: Predictor
    if kind in ("fused", "bf16"):
        predictor = NinoPredictor(weights, graphs=graphs, precision="bf16" if kind == "bf16" else "fp32")
    else:
        predictor = PlainNinoPredictor(weights, graphs=graphs, trimmed=kind == "trimmed")
    warm_up = random_history(SHAPES["0.2M"].manifest())
    predictor.predict(warm_up, HORIZON_INTERVALS, torch.empty(warm_up.manifest.num_elements))
    history = random_history(SHAPES[size].manifest())
    num_parameters = history.manifest.num_elements
    # The graph is built once for each model and kept, so it is no part of a nowcast.
    graphs.graph(history.manifest, "official", weights.config.lpe_dim)
    rates, trials = [matmul_rate(num_threads)], []
    while sum(trial.wall_s for trial in trials) < MIN_TRIALS_S and len(trials) < MAX_TRIALS:
        trials.append(measure(predictor, history, HORIZON_INTERVALS))
        rates.append(matmul_rate(num_threads))
    wall_rate, cpu_rate = (max(pair) for pair in zip(*rates, strict=True))
    wall_s, cpu_s = (statistics.median(getattr(trial, key) for trial in trials) for key in ("wall_s", "cpu_s"))
    return {
        "kind": kind,
        "size": size,
        "num_parameters": num_parameters,
        "wall_s": wall_s,
        "wall_s_of_trials": [round(trial.wall_s, 3) for trial in trials],
        "cpu_s": cpu_s,
        "extra_mib": max(trial.extra_bytes for trial in trials) / 2**20,
        "s_per_million": wall_s / num_parameters * 1e6,
        "matmul_gflops": wall_rate / 1e9,
        "share_of_matmul_rate": FLOPS_PER_PARAMETER * num_parameters / wall_s / wall_rate,
        "share_of_matmul_rate_by_cpu_time": FLOPS_PER_PARAMETER * num_parameters / cpu_s / cpu_rate,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, help="NiNo weights (nino_no_posw.pt); random ones by default")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--here", action="store_true", help="what this processor runs and reaches, and no more")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", nargs=2, metavar=("KIND", "SIZE"), help="run one case in this process")
    arguments = parser.parse_args()
    if arguments.here:
        report_here()
        return
    if arguments.case:
        print(json.dumps(run_case(*arguments.case, arguments.weights, arguments.threads)))
        return
    has_bf16 = taken_loops("bf16") != TORCH_LOOPS
    print(json.dumps(_machine()))
    preset = PRESETS[arguments.preset]
    kinds = ["fused", "trimmed", "plain", *(["bf16"] if has_bf16 else []), "fused"]
    cases = [(kind, size) for size in preset["compare"] for kind in kinds]
    cases += [("fused", size) for size in preset["scale"]]
    results = []
    for kind, size in cases:
        command = [sys.executable, "-m", "benchmarks.bench_nino"]
        command += [] if arguments.weights is None else ["--weights", str(arguments.weights)]
        command += ["--threads", str(arguments.threads), "--case", kind, size]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(output))
        print(json.dumps(results[-1]), flush=True)
    for size in preset["compare"]:
        print(json.dumps({"size": size, **_ratios([result for result in results if result["size"] == size])}))


def _ratios(results: list[dict[str, Any]]) -> dict[str, float]:
    def median(kind: str, key: str) -> float:
        return statistics.median(result[key] for result in results if result["kind"] == kind)

    return {
        f"{kind}_over_fused_{key}": round(median(kind, key) / median("fused", key), 1)
        for kind in ("plain", "trimmed", "bf16")
        if any(result["kind"] == kind for result in results)
        for key in ("wall_s", "cpu_s")
    }


if __name__ == "__main__":
    main()
