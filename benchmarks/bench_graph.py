"""What a graph and its positional encoding cost by model size, against PyTorch Geometric's transform where it can.

Every case runs in a process of its own, so that its peak memory is its own.

    python -m benchmarks.bench_graph --preset ci | full
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.llama_sizes import LLAMA_SIZES
from sidecast.graphs import build_topology, laplacian_encoding, to_edges

PRESETS = {
    "ci": (("100K", "400K", "8B"), ("100K",)),
    "full": (tuple(LLAMA_SIZES), ("100K", "400K", "1M")),
}
GIB = 2**30


def measure_sidecast(size: str, layout: str) -> dict[str, float | int | str]:
    """Seconds to build the topology and the encoding, and what they are."""
    manifest = LLAMA_SIZES[size].manifest()
    start = time.perf_counter()
    topology = build_topology(manifest, layout)
    built = time.perf_counter()
    encoding = laplacian_encoding(topology)
    return {
        "parameters": manifest.num_elements,
        "nodes": len(encoding),
        "blocks": len(topology.blocks),
        "edges": topology.num_edges,
        "build_s": built - start,
        "encoding_s": time.perf_counter() - built,
    }


def measure_pyg(size: str) -> dict[str, float | int | str]:
    """Seconds of ``AddLaplacianEigenvectorPE`` on the written-out graph."""
    from torch_geometric.data import Data
    from torch_geometric.transforms import AddLaplacianEigenvectorPE

    topology = build_topology(LLAMA_SIZES[size].manifest(), "official")
    start = time.perf_counter()
    data = Data(edge_index=to_edges(topology).index_2E, num_nodes=topology.num_nodes)
    written = time.perf_counter()
    AddLaplacianEigenvectorPE(k=8, attr_name="pos", is_undirected=False)(data)
    return {
        "nodes": topology.num_nodes,
        "edges": topology.num_edges,
        "build_s": written - start,
        "encoding_s": time.perf_counter() - written,
    }


def run_case(size: str, method: str) -> dict[str, float | int | str]:
    """Measures one case in this process."""
    result = measure_pyg(size) if method == "pyg" else measure_sidecast(size, method)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"size": size, "method": method, **result, "peak_gib": peak_bytes / GIB}


def run_in_child(size: str, method: str) -> dict[str, float | int | str]:
    """Measures one case in a new process."""
    command = [sys.executable, "-m", "benchmarks.bench_graph", "--case", size, method]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float | int | str] = json.loads(answer.stdout.splitlines()[-1])
    return result


def report(preset: str, num_trials: int) -> None:
    """Writes a table of medians to stdout."""
    sizes, pyg_sizes = PRESETS[preset]
    cases = [(size, method) for size in sizes for method in ("official", "symmetric")]
    cases += [(size, "pyg") for size in pyg_sizes]
    write = sys.stdout.write
    write(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    write(f"{'size':>5} {'method':>9} {'nodes':>11} {'edges':>15} {'blocks':>7} {'build s':>8} {'lpe s':>8} ")
    write(f"{'spread':>7} {'peak GiB':>8}\n")
    totals: dict[tuple[str, str], float] = {}
    for size, method in sorted(cases, key=lambda case: list(LLAMA_SIZES).index(case[0])):
        trials = [run_in_child(size, method) for _ in range(num_trials)]
        build, encoding = ([float(trial[key]) for trial in trials] for key in ("build_s", "encoding_s"))
        total = [sum(pair) for pair in zip(build, encoding, strict=True)]
        totals[size, method] = statistics.median(total)
        write(
            f"{size:>5} {method:>9} {trials[0]['nodes']:>11,} {trials[0]['edges']:>15,} "
            f"{trials[0].get('blocks', '-'):>7} {statistics.median(build):8.3f} {statistics.median(encoding):8.3f} "
            f"{max(total) - min(total):7.3f} {max(float(trial['peak_gib']) for trial in trials):8.2f}\n"
        )
    for size in pyg_sizes:
        write(f"{size}: PyTorch Geometric / official = {totals[size, 'pyg'] / totals[size, 'official']:.1f}x\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="ci")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--case", nargs=2, metavar=("SIZE", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        sys.stdout.write(json.dumps(run_case(*arguments.case)) + "\n")
    else:
        report(arguments.preset, arguments.trials)


if __name__ == "__main__":
    main()
