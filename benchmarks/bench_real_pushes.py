"""What pushes are worth through a real service with its real delays, seed by seed against the same runs without them.

Trains a task of ``sidecast evaluate`` as people train: ranks under DeepSpeed's launcher (ZeRO-2), couriers, a service
beside them that makes each push while training goes on, votes. The peer is the same job without a nowcaster; a pair
shares first weights and data. With ``--farm`` the same cell of a farm's results, where nothing is ever late, stands
beside it: the bar is 80 % of the farm's difference. The same command goes on where it was stopped.

    python -m benchmarks.bench_real_pushes --lr 4e-3 --b1 0.8 [--seeds 8] [--out FOLDER] [--farm FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.bench_stall import service
from sidecast.evaluation.analysis import Interval, interval
from sidecast.evaluation.corpora import load_corpus
from sidecast.evaluation.models.llama import LlamaConfig
from sidecast.evaluation.read_outs import RAW
from sidecast.evaluation.results import ResultStore
from sidecast.evaluation.tasks import Task, find_task
from sidecast.trainer.job.run_log import METRICS_NAME, read_records

ARMS = ("without", "with")


def corpus_file(task: Task, out: Path) -> Path:
    """The task's text, as the job reads it; the last tenth is held out."""
    path = out / "corpus.txt"
    if not path.exists():
        corpus = load_corpus(task.corpus)
        path.write_bytes(corpus.train_tokens.numpy().tobytes() + corpus.validation_tokens.numpy().tobytes())
    return path


def configuration(task: Task, arguments: argparse.Namespace, corpus: Path) -> dict[str, Any]:
    """The job's settings: model, batch, optimizer and schedule as the farm has them."""
    model = task.model
    if not isinstance(model, LlamaConfig):
        raise SystemExit(f"task is {task.name!r}, which is no Llama; the job trains no other model from scratch")
    if task.change is not None:
        raise SystemExit(f"task is {task.name!r}, which changes its text on the way; the job reads one only")
    return {
        "train_micro_batch_size_per_gpu": task.batch_size // arguments.ranks,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": arguments.lr, "betas": [arguments.b1, 0.95], "weight_decay": 0.1, "torch_adam": True},
        },
        "steps_per_print": 1_000_000_000,
        "training": {
            "steps": arguments.steps,
            "validation_interval_steps": arguments.steps,
            "model": {
                "hidden_size": model.width,
                "intermediate_size": model.hidden_width,
                "num_hidden_layers": model.num_layers,
                "num_attention_heads": model.num_heads,
                "num_key_value_heads": model.num_kv_heads,
            },
            "data": {
                "corpus": str(corpus),
                "sequence_length": task.sequence_length,
                "validation_sequences": task.num_validation_sequences,
                "validation_fraction": 0.1,
            },
            "schedule": {"kind": "cosine", "warmup_steps": arguments.warmup, "min_ratio": 0.05},
        },
        "nowcaster": {"policy": "push"},
    }


def train(config: Path, run_dir: Path, seed: int, num_ranks: int, settings: Sequence[str]) -> None:
    """One run, by the launcher; one that has ended before is kept."""
    if (run_dir / METRICS_NAME).exists() and any(
        record["kind"] == "summary" for record in read_records(run_dir / METRICS_NAME)
    ):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", f"{num_ranks}"]
    command += ["--master_port", f"{port}", "--module", "sidecast.trainer.main", "--config", str(config)]
    command += ["--seed", f"{seed}", "--run-dir", str(run_dir)]
    for setting in settings:
        command += ["--set", setting]
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **os.environ}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "log").open("wb") as log:
        status = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise SystemExit(f"a run ended with status {status}:\n{(run_dir / 'log').read_text()[-3000:]}")


def outcome(run_dir: Path) -> dict[str, Any]:
    """The last validation loss, and what became of the pushes."""
    records = list(read_records(run_dir / METRICS_NAME))
    applied = [record["details"] for record in records if record.get("event") == "applied"]
    return {
        "loss": [record["loss"] for record in records if record["kind"] == "validation"][-1],
        "training_s": next(record["training_s"] for record in records if record["kind"] == "summary"),
        "num_applied": len(applied),
        "num_dropped": sum(record.get("event") == "dropped" for record in records),
        "staleness_steps": [push["staleness_steps"] for push in applied],
        "weights": [push["weight"] for push in applied],
    }


def farm_difference(folder: Path, arguments: argparse.Namespace) -> Interval | None:
    """The farm's difference in the same cell, by the seeds that both of its arms have there."""
    losses: dict[str, dict[int, float]] = {"adamw": {}, "push": {}}
    for finished in ResultStore(folder).read().values():
        settings = finished.settings
        cell = (settings.task, settings.schedule.kind, settings.num_steps, settings.optimizer.lr, settings.optimizer.b1)
        if settings.arm in losses and cell == (
            arguments.task,
            "cosine",
            arguments.steps,
            arguments.lr,
            arguments.b1,
        ):
            losses[settings.arm][settings.seed] = finished.result.final_losses[RAW]
    seeds = losses["adamw"].keys() & losses["push"].keys()
    return interval([losses["push"][seed] - losses["adamw"][seed] for seed in sorted(seeds)]) if seeds else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="english-wide")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--b1", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, help="keeps the runs, so that the command goes on where it was stopped")
    parser.add_argument("--farm", type=Path, help="folder of a farm's results")
    arguments = parser.parse_args()
    if arguments.out is None:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, Path(folder))
    else:
        measure(arguments, arguments.out.absolute())


def measure(arguments: argparse.Namespace, out: Path) -> None:
    """Trains what is missing in a folder, and prints the comparison."""
    out.mkdir(parents=True, exist_ok=True)
    task = find_task(arguments.task)
    config = out / "ds_config.json"
    config.write_text(json.dumps(configuration(task, arguments, corpus_file(task, out)), indent=2))
    with service(out, niceness=0) as endpoint:
        for seed in range(arguments.seeds):
            for arm in ARMS:
                setting = "nowcaster.enabled=false" if arm == "without" else f"nowcaster.endpoint={endpoint}"
                train(config, out / f"seed{seed}" / arm, seed, arguments.ranks, [setting])
                loss = outcome(out / f"seed{seed}" / arm)["loss"]
                sys.stderr.write(f"seed {seed}, {arm} pushes: {loss:.4f}\n")
    pairs = [{arm: outcome(out / f"seed{seed}" / arm) for arm in ARMS} for seed in range(arguments.seeds)]
    real = interval([pair["with"]["loss"] - pair["without"]["loss"] for pair in pairs])
    farm = None if arguments.farm is None else farm_difference(arguments.farm, arguments)
    result = {
        "task": arguments.task,
        "lr": arguments.lr,
        "b1": arguments.b1,
        "ranks": arguments.ranks,
        "loss_without": fmean(pair["without"]["loss"] for pair in pairs),
        "loss_with": fmean(pair["with"]["loss"] for pair in pairs),
        "difference": vars(real),
        "num_better": sum(pair["with"]["loss"] < pair["without"]["loss"] for pair in pairs),
        "farm_difference": None if farm is None else vars(farm),
        "share_of_farm": None if farm is None else real.mean / farm.mean,
        "pushes_applied": [pair["with"]["num_applied"] for pair in pairs],
        "snapshots_dropped": [pair["with"]["num_dropped"] for pair in pairs],
        "median_staleness_steps": median(steps for pair in pairs for steps in pair["with"]["staleness_steps"]),
        "mean_weight": fmean(weight for pair in pairs for weight in pair["with"]["weights"]),
        "training_s_ratio": fmean(pair["with"]["training_s"] / pair["without"]["training_s"] for pair in pairs),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
    }
    text = json.dumps(result, indent=2)
    (out / "result.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
