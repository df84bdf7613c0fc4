"""How many runs an hour a farm makes, against the same runs as separate processes of a plain loop, on as many cores.

Both sides train the task's 155 thousand parameters in fp32, one thread for each process, and take turns in the same
call. Start-up is left out on both sides; so is what only the farm does, validation and reports. The peer is the loop
that everybody writes: a model of torch's operators, ``backward``, ``clip_grad_norm_`` and ``torch.optim.AdamW``.

    python -m benchmarks.bench_farm --preset ci | full
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from sidecast.evaluation.batches import training_batch
from sidecast.evaluation.corpora import load_corpus
from sidecast.evaluation.farm import GroupRun
from sidecast.evaluation.gradients import Engine
from sidecast.evaluation.models.model import views
from sidecast.evaluation.native.llama_gradients import native_gradients
from sidecast.evaluation.schedules import Schedule
from sidecast.evaluation.settings import MemberSettings, MethodSettings, OptimizerSettings
from sidecast.evaluation.tasks import find_task

TASK = find_task("python-bytes")
RUN_STEPS = 1500
# trials, member-steps of each process in one trial
PRESETS = {"ci": (3, 32), "full": (7, 160)}
SIDES = ("farm", "separate")
NUM_MEMBERS = 8


def floor_lines() -> str:
    """What a step cannot do without, and how long the measured speed of matrix products makes that."""
    config, tokens = TASK.model, TASK.batch_size * TASK.sequence_length
    manifest = config.build().manifest
    matrices = sum(spec.numel for spec in manifest.parameters if len(spec.shape) == 2)
    products = 6 * matrices * tokens
    # Scores and mixtures, forward and twice backward, of the tokens that may be seen.
    width = config.num_heads * config.head_dim
    attention = 6 * 2 * config.num_layers * tokens * width * (TASK.sequence_length + 1) / 2
    # Weights and gradients once, weights and two moments read and written by the optimizer.
    num_bytes = 4 * manifest.num_elements * (2 + 7)
    left, right = torch.randn(2048, 64), torch.randn(64, 352)
    best_s = min(_seconds(left, right) for _ in range(20))
    speed = 2 * 2048 * 64 * 352 / best_s
    return (
        f"floor of one step of one member: {products / 1e9:.2f} GFLOP in products, {attention / 1e9:.2f} in attention, "
        f"{num_bytes / 1e6:.1f} MB; at the {speed / 1e9:.0f} GFLOP/s of torch's products here "
        f"{1e3 * (products + attention) / speed:.1f} ms\n"
    )


def _seconds(left: torch.Tensor, right: torch.Tensor) -> float:
    started_s = time.process_time()
    for _ in range(10):
        torch.mm(left, right)
    return (time.process_time() - started_s) / 10


def run_farm(num_steps: int, folder: Path) -> None:
    """Member-steps of a group, half of them pushed."""
    members = [
        MemberSettings(
            task=TASK.name,
            arm="",
            seed=0,
            num_steps=RUN_STEPS,
            schedule=Schedule(),
            optimizer=OptimizerSettings(lr=lr),
            method=MethodSettings(name=name, options={"start_step": 0} if name == "push" else {}),
        )
        for lr in (2e-3, 4e-3, 8e-3, 1.2e-2)
        for name in ("none", "push")
    ]
    assert len(members) == NUM_MEMBERS
    gradients = native_gradients(TASK.model.build(), TASK.sequence_length, folder)
    run = GroupRun(TASK, [load_corpus(TASK.corpus, folder)], members, Engine(), gradients=gradients)
    run.advance(1)
    _timed(lambda: run.advance(num_steps // NUM_MEMBERS), "torch" if gradients is None else "native")


def run_separate(num_steps: int, folder: Path) -> None:
    """Steps of one run in a plain loop."""
    model, corpus, schedule = TASK.model.build(), load_corpus(TASK.corpus, folder), Schedule()
    initial = views(model, model.initial(0)[None])
    parameters = {name: torch.nn.Parameter(view.clone()) for name, view in initial.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(index: int) -> None:
        batch = training_batch(corpus.train_tokens, 0, index, TASK.batch_size, TASK.sequence_length)
        optimizer.param_groups[0]["lr"] = 4e-3 * schedule.ratio(index, RUN_STEPS)
        optimizer.zero_grad()
        model.losses(parameters, *batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()

    step(0)

    def steps() -> None:
        for index in range(1, num_steps + 1):
            step(index)

    _timed(steps, "torch")


def _timed(work: object, arithmetic: str) -> None:
    """Waits for the word, works, and says how long it took."""
    assert callable(work)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    started = time.perf_counter(), time.process_time()
    work()
    spent = time.perf_counter() - started[0], time.process_time() - started[1]
    sys.stdout.write(json.dumps({"wall_s": spent[0], "cpu_s": spent[1], "arithmetic": arithmetic}) + "\n")


def trial(side: str, num_processes: int, num_steps: int, folder: Path) -> dict[str, float | str]:
    """Runs an hour, by the wall and by the processors' time, of some processes that start together."""
    command = [sys.executable, "-m", "benchmarks.bench_farm", "--child", side, str(num_steps), str(folder)]
    children = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(num_processes)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    results = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    hours = 3600 * num_steps / RUN_STEPS
    return {
        "wall": num_processes * hours / max(result["wall_s"] for result in results),
        "cpu": num_processes * hours * num_processes / sum(result["cpu_s"] for result in results),
        "arithmetic": results[0]["arithmetic"],
    }


def report(preset: str, num_processes: int) -> None:
    """Writes runs an hour and their ratio to stdout."""
    num_trials, num_steps = PRESETS[preset]
    torch.set_num_threads(1)
    write = sys.stdout.write
    write(f"{platform.machine()}, torch {torch.__version__}, {num_processes} processes of one thread each\n")
    write(floor_lines())
    found: dict[str, list[dict[str, float | str]]] = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        load_corpus(TASK.corpus, Path(folder))
        native_gradients(TASK.model.build(), TASK.sequence_length, Path(folder))
        for index in range(num_trials):
            for side in SIDES if index % 2 else reversed(SIDES):
                found[side].append(trial(side, num_processes, num_steps, Path(folder)))
    write(f"farm of {NUM_MEMBERS} members a process, {found['farm'][0]['arithmetic']} arithmetic\n")
    for clock in ("wall", "cpu"):
        rates = {side: [float(each[clock]) for each in found[side]] for side in SIDES}
        ratios = [farm / separate for farm, separate in zip(*rates.values(), strict=True)]
        shown = ", ".join(f"{side} {statistics.median(rates[side]):.1f}" for side in SIDES)
        write(
            f"runs of {RUN_STEPS:,} steps an hour by {clock} time: {shown}; ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {num_trials} trials)\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="ci")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "STEPS", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        torch.set_num_threads(1)
        side, num_steps, folder = arguments.child
        {"farm": run_farm, "separate": run_separate}[side](int(num_steps), Path(folder))
    else:
        report(arguments.preset, arguments.processes)


if __name__ == "__main__":
    main()
