"""``sidecast evaluate --forks``: read-outs of runs at a constant rate against decays that are forked from them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch

from sidecast.errors import ConfigError
from sidecast.evaluation.forks.analysis import by_setting, table
from sidecast.evaluation.forks.results import ForkResult, add_fork, read_forks
from sidecast.evaluation.forks.run import ForkedRun
from sidecast.evaluation.forks.settings import DECAY_FRACTIONS, ForkSettings
from sidecast.evaluation.gradients import Engine
from sidecast.evaluation.grid import Grid
from sidecast.evaluation.running import compiled_gradients, conditions_of, corpora_of, member_keys
from sidecast.evaluation.schedules import Schedule
from sidecast.evaluation.tasks import find_task

REPORT_NAME = "forks.md"


def run_forks(args: argparse.Namespace, grid: Grid, engine: Engine) -> int:
    """Trains what is missing and writes the table; returns the exit status.

    Raises:
        ConfigError: A decay begins in the warm-up, or something is asked for that forks do not do.
    """
    if args.methods or args.schedule or args.workers != 1:
        raise ConfigError(
            "--forks is of plain AdamW at a constant rate, in one process: without --methods, --schedule, --workers"
        )
    fractions = tuple(args.decays or DECAY_FRACTIONS)
    schedule = Schedule(kind="constant", warmup_steps=grid.schedules[0].warmup_steps)
    members = [
        ForkSettings(member=member, fractions=fractions)
        for member in Grid(
            tasks=grid.tasks,
            arms=grid.arms[:1],
            schedules=[schedule],
            lrs=grid.lrs,
            b1s=grid.b1s,
            lengths=grid.lengths,
            num_seeds=grid.num_seeds,
            optimizer=grid.optimizer,
        ).members()
    ]
    if not args.report_only:
        _train(args, members, engine)
    results = read_forks(args.out)
    if not results:
        raise ConfigError(f"--out is {str(args.out)!r}, which has no results; train some without --report-only")
    text = "\n".join(table(setting, steps) for setting, steps in by_setting(results.values()).items())
    (args.out / REPORT_NAME).write_text(text, encoding="utf-8")
    sys.stdout.write(f"{text}\nwritten: {args.out / REPORT_NAME}\n")
    return 0


def _train(args: argparse.Namespace, members: Sequence[ForkSettings], engine: Engine) -> None:
    torch.set_num_threads(args.threads)
    corpora = args.out / "corpora"
    names = member_keys([item.member for item in members], corpora, engine)
    finished = read_forks(args.out)
    jobs = [
        (item, key)
        for item, key in ((item, item.key(name)) for item, name in zip(members, names, strict=True))
        if key not in finished
    ]
    sys.stderr.write(f"{len(jobs)} runs with forks to do, {sum(num_steps(item) for item, _ in jobs):,} steps\n")
    for index, (item, key) in enumerate(jobs, 1):
        began_s = time.process_time()
        task = find_task(item.member.task)
        gradients = compiled_gradients(task, engine, args.out / "native")
        losses = ForkedRun(task, corpora_of(task, corpora), item, engine, gradients).losses()
        conditions = {
            **conditions_of(engine, 1, "torch" if gradients is None else "native"),
            "cpu_s": round(time.process_time() - began_s, 1),
        }
        add_fork(args.out, ForkResult(key=key, settings=item, losses=losses, conditions=conditions))
        sys.stderr.write(
            f"{index} of {len(jobs)}: seed {item.member.seed}, lr {item.member.optimizer.lr:g}, "
            f"{conditions['cpu_s']:g} s of a processor\n"
        )


def num_steps(settings: ForkSettings) -> int:
    """Steps of a run with all its forks."""
    forks = sum(step - decay.start(step) for step in settings.checkpoints for decay in settings.decays)
    return settings.member.num_steps + forks
