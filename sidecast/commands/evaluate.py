"""``sidecast evaluate``: what methods are worth, measured on many small models."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sidecast.commands.evaluate_forks import run_forks
from sidecast.errors import ConfigError
from sidecast.evaluation.analysis import Results
from sidecast.evaluation.gradients import PRECISIONS, Engine
from sidecast.evaluation.grid import ARMS, BASELINE, Arm, Grid, parse_arm
from sidecast.evaluation.reports.report import html_page, markdown
from sidecast.evaluation.reports.tables import comparison_tables
from sidecast.evaluation.results import Finished, ResultStore
from sidecast.evaluation.running import Job, Workers, open_jobs, run_jobs
from sidecast.evaluation.schedules import KINDS, Schedule
from sidecast.evaluation.settings import OptimizerSettings
from sidecast.evaluation.tasks import TASKS, find_task


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Lists for a grid that has been thought about."""

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    schedules: tuple[str, ...]
    lrs: tuple[float, ...]
    b1s: tuple[float, ...]
    num_seeds: int
    num_steps: int
    baseline_lengths: tuple[int, ...]
    warmup_steps: int = 100


PRESETS = {
    "smoke": Preset(
        tasks=("smoke",),
        methods=("adamw", "push:start_step=20"),
        schedules=("cosine",),
        lrs=(4e-3, 8e-3),
        b1s=(0.9,),
        num_seeds=2,
        num_steps=60,
        baseline_lengths=(80, 100),
        warmup_steps=10,
    ),
    "what-pays": Preset(
        tasks=("python-bytes",),
        methods=("adamw", "push"),
        schedules=("cosine",),
        lrs=(4e-3, 8e-3, 1.2e-2),
        b1s=(0.8, 0.9),
        num_seeds=8,
        num_steps=1500,
        baseline_lengths=(1350, 1650, 1800, 2100),
    ),
}


def add_parser(subparsers: Any) -> None:
    """Adds the subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure what methods are worth on many small models",
        description="Trains every combination of tasks, methods, schedules, learning rates, b1 and seeds, and compares "
        "the methods with AdamW, both tuned. What is finished is kept in --out: the same command goes on after "
        "Ctrl-C, and more seeds or methods add to what is there. Options override those of a preset.",
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="smoke", help="default: smoke")
    parser.add_argument("--task", nargs="+", metavar="NAME", help=f"one or more of: {', '.join(TASKS)}")
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME[:OPTION=VALUE,...]", help=f"one or more of: {', '.join(ARMS)}"
    )
    parser.add_argument("--schedule", nargs="+", metavar="NAME", help=f"one or more of: {', '.join(KINDS)}")
    parser.add_argument("--lr", nargs="+", type=float, help="peak learning rates")
    parser.add_argument("--b1", nargs="+", type=float, help="time constants of the first moment")
    parser.add_argument("--b2", type=float, default=0.95, help="time constant of the second moment (default 0.95)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="decoupled weight decay (default 0.1)")
    parser.add_argument("--seeds", type=int, help="number of seeds; each decides weights and data")
    parser.add_argument("--steps", type=int, help="length of every run")
    parser.add_argument("--warmup", type=int, help="steps of warm-up")
    parser.add_argument("--baseline-steps", nargs="*", type=int, help=f"further lengths of {BASELINE}")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--workers", type=int, default=1, help="groups trained at the same time (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker (default 1)")
    parser.add_argument("--group", type=int, default=8, help="members trained side by side (default 8)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:0 ... (default cpu)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of matrix products (default fp32)")
    parser.add_argument(
        "--forks",
        action="store_true",
        help="instead of methods: read-outs of AdamW at a constant rate, at 25, 50, 75 and 100 %% of --steps, against "
        "decays that are forked from it and end there",
    )
    parser.add_argument(
        "--decays", nargs="+", type=float, help="lengths of these decays, as shares of the steps (default 0.1 0.2 0.4)"
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing; write the tables of what is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains what is missing and writes the tables; returns the exit status."""
    grid = _grid(args)
    store = ResultStore(args.out)
    for name in ("workers", "threads", "group"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    engine = Engine(device=args.device, precision=args.precision)
    if args.forks:
        return run_forks(args, grid, engine)
    if args.decays:
        raise ConfigError("--decays goes with --forks, which is missing")
    workers = Workers(engine=engine, num_processes=args.workers, num_threads=args.threads, max_members=args.group)
    if not args.report_only:
        try:
            _train(grid, store, workers)
        except KeyboardInterrupt:
            sys.stderr.write(f"\nstopped; the same command goes on from what is in {args.out}\n")
            return 130
    finished = store.read().values()
    if not finished:
        raise ConfigError(f"--out is {str(args.out)!r}, which has no results; train some without --report-only")
    _write_report(finished, args.out)
    return 0


def _train(grid: Grid, store: ResultStore, workers: Workers) -> None:
    jobs = open_jobs(grid.members(), store, workers)
    progress = Progress(jobs)
    sys.stderr.write(f"{progress.num_members} runs to do, {progress.total:,} steps\n")
    run_jobs(jobs, store, workers, progress)
    if jobs:
        sys.stderr.write("\n")


class Progress:
    """One line that says how far a farm is.

    Args:
        jobs: What is to be done.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.num_members = sum(len(job.members) for job in jobs)
        self.total = sum(member.num_steps for job in jobs for member in job.members)
        self._taken = 0
        self._started_s = time.monotonic()
        self._shown_s = 0.0

    def __call__(self, num_steps: int) -> None:
        """Takes note of steps, and rewrites the line at most once a second."""
        self._taken += num_steps
        now_s = time.monotonic()
        if now_s - self._shown_s < 1.0 and self._taken < self.total:
            return
        self._shown_s = now_s
        spent_s = now_s - self._started_s
        left_s = spent_s * (self.total - self._taken) / self._taken if self._taken else 0.0
        rate = self._taken / spent_s if spent_s else 0.0
        sys.stderr.write(
            f"\r{100 * self._taken / self.total:5.1f} %  {rate:6.1f} steps/s  {_clock(spent_s)} spent, "
            f"about {_clock(left_s)} left "
        )
        sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def _write_report(finished: Iterable[Finished], out: Path) -> None:
    members = list(finished)
    results = Results(members)
    text = markdown(comparison_tables(results))
    conditions = sorted(
        {
            f"torch {member.conditions['torch']}, {member.conditions['device']}, {member.conditions['precision']}"
            for member in members
        }
    )
    line = f"{len(members)} runs; {'; '.join(conditions)}"
    (out / "report.md").write_text(f"# What it is worth\n\n{line}\n\n{text}", encoding="utf-8")
    (out / "report.html").write_text(html_page(results, line), encoding="utf-8")
    sys.stdout.write(f"{text}\nwritten: {out / 'report.md'}, {out / 'report.html'}\n")


def _grid(args: argparse.Namespace) -> Grid:
    preset = PRESETS[args.preset]
    num_seeds = preset.num_seeds if args.seeds is None else args.seeds
    num_steps = preset.num_steps if args.steps is None else args.steps
    warmup_steps = preset.warmup_steps if args.warmup is None else args.warmup
    if num_seeds < 1:
        raise ConfigError(f"--seeds is {num_seeds}; it must be at least 1")
    # Another length makes a preset's further lengths meaningless.
    lengths = preset.baseline_lengths if args.steps in (None, preset.num_steps) else ()
    tasks = [find_task(name).name for name in args.task or preset.tasks]
    arms: list[Arm] = [parse_arm(text) for text in args.methods or preset.methods]
    if BASELINE not in {arm.name for arm in arms}:
        arms.insert(0, ARMS[BASELINE])
    return Grid(
        tasks=tasks,
        arms=arms,
        schedules=[Schedule(kind=kind, warmup_steps=warmup_steps) for kind in args.schedule or preset.schedules],
        lrs=args.lr or preset.lrs,
        b1s=args.b1 or preset.b1s,
        lengths=[num_steps],
        baseline_lengths=lengths if args.baseline_steps is None else args.baseline_steps,
        num_seeds=num_seeds,
        optimizer=replace(OptimizerSettings(), b2=args.b2, weight_decay=args.weight_decay),
    )
