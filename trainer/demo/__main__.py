"""The whole loop on one machine: a service, a training run with nowcasts, the same run without, and a report.

Where the learning rate decays, a third run keeps it constant: what the decay alone is worth belongs beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sidecast.errors import ConfigError, SidecastError
from sidecast.trainer.demo.children import Child, ChildFailedError, Children
from sidecast.trainer.demo.leftovers import find_lock, free_shared_buffers
from sidecast.trainer.job.config import JobConfig, load_config, parse_override
from sidecast.trainer.job.progress import ProgressBar
from sidecast.trainer.job.run_log import METRICS_NAME, Record, read_records
from sidecast.trainer.report.__main__ import write_report

POLL_INTERVAL_S = 0.25
SERVICE_START_TIMEOUT_S = 180.0
NOWCAST_RUN = "with_nowcasts"
BASELINE_RUN = "without_nowcasts"
CONSTANT_RATE_RUN = "constant_rate_without_nowcasts"
SERVICE_LOG = "service.log"
# One of them is the first thing that a demo writes.
LOG_NAMES = (SERVICE_LOG, f"{NOWCAST_RUN}.log")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; a failure is one line on stderr.

    Returns:
        Exit status: 0; 2 if something was refused or failed; 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _leave)
    try:
        run_demo(arguments)
    except SidecastError as error:
        sys.stderr.write(f"sidecast: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("sidecast: stopped\n")
        return 130
    return 0


def run_demo(arguments: argparse.Namespace) -> None:
    """Trains two or three times and reports.

    Raises:
        SidecastError: A setting is refused or a process failed.
    """
    out = Path(arguments.out)
    config = load_config(arguments.config, [parse_override(text) for text in arguments.set])
    num_steps = arguments.steps if arguments.steps is not None else config.training.steps
    environment = _environment(arguments.num_ranks)
    _note_lock(environment)
    _empty(out)
    runs = _runs(config)
    _say(_plan(config, runs, num_steps, out))
    started_s = time.monotonic()
    with Children() as children:
        service = None
        endpoint = arguments.endpoint
        if endpoint is None:
            _say("starting the nowcaster service")
            service, endpoint = _start_service(children, out, arguments, environment)
        _say(f"nowcaster service at {endpoint}")
        for number, run in enumerate(runs, 1):
            settings = [*run.settings, *([f"nowcaster.endpoint={endpoint}"] if run.is_nowcasted else [])]
            _train(
                children,
                f"{number} of {len(runs)}: {run.title}",
                _training_command(arguments, out / run.folder, num_steps, settings),
                out / run.folder,
                num_steps,
                environment,
                service if run.is_nowcasted else None,
            )
            if run.is_nowcasted and service is not None:
                children.end(service)
    beside = [out / run.folder for run in runs[2:]]
    summary = write_report(out / NOWCAST_RUN, out / BASELINE_RUN, out, beside)
    sys.stdout.write(f"\n{summary}\n\nreport: {out / 'report.html'}\nplot:   {out / 'loss.png'}\n")
    _say(f"done in {time.monotonic() - started_s:.0f} s")


@dataclass(frozen=True)
class _Run:
    """One training run of the demo.

    Attributes:
        title: What it does, in a few words.
        folder: Its name in the output folder.
        is_nowcasted: Whether it uses the service.
        settings: What it sets besides the configuration.
    """

    title: str
    folder: str
    is_nowcasted: bool = False
    settings: tuple[str, ...] = ()


def _runs(config: JobConfig) -> list[_Run]:
    """The nowcasted run, the same without and, where its learning rate decays, one at a constant rate."""
    policy = config.deepspeed.get("nowcaster", {}).get("policy", "jump")
    kind = "pushes" if policy == "push" else "jumps"
    without = "nowcaster.enabled=false"
    runs = [
        _Run(f"training with {kind}", NOWCAST_RUN, is_nowcasted=True),
        _Run("training without", BASELINE_RUN, settings=(without,)),
    ]
    if config.training.schedule.kind != "constant":
        # A decay of its own length is only for a schedule that has one.
        constant = (without, 'training.schedule.kind="constant"', "training.schedule.decay_steps=null")
        runs.append(_Run("training without, at a constant rate", CONSTANT_RATE_RUN, settings=constant))
    return runs


def _plan(config: JobConfig, runs: Sequence[_Run], num_steps: int, out: Path) -> str:
    """What will happen, and what to look at meanwhile and afterwards."""
    lines = [f"This trains a small model {len(runs)} times, {num_steps:,} steps each, one after another:"]
    lines += [f"  {number}. {run.title}" for number, run in enumerate(runs, 1)]
    lines += [
        "All see the same data in the same order, from the same weights.",
        "Look at the validation losses of 1 and 2 at the same step: lower in 1 is what nowcasts gain.",
    ]
    if len(runs) > 2:
        lines.append("3 shows what the decay of the learning rate is worth by itself.")
    lines += [
        f"Logs are in {out}; the report with all curves will be {out / 'report.html'}.",
        "A first start compiles an operator of DeepSpeed, which can take some minutes. Ctrl-C ends everything.",
    ]
    return "\n".join(lines) + "\n"


def _empty(out: Path) -> None:
    """Makes the output folder, without an earlier demo's files, and without anybody else's loss."""
    if out.exists():
        is_ours = out.is_dir() and (not any(out.iterdir()) or any((out / name).exists() for name in LOG_NAMES))
        if not is_ours:
            raise ConfigError(f"--out {out} would be emptied; allowed: a new or empty folder, or an earlier demo's")
        shutil.rmtree(out)
    out.mkdir(parents=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sidecast.trainer.demo",
        description="Starts a nowcaster service, trains a small Llama on Python's standard library with nowcasts, "
        "again without and, where the learning rate decays, a third time at a constant one, and writes a report that "
        "compares the runs.",
    )
    parser.add_argument(
        "--out", default="runs/demo", help="where everything is written; emptied (default: %(default)s)"
    )
    parser.add_argument("--config", default="demo", help="DeepSpeed configuration, or a shipped one's name")
    parser.add_argument("--num-ranks", type=int, default=2, help="training processes (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: the configuration's)")
    parser.add_argument("--endpoint", help="HOST:PORT of a running service (default: start one and end it afterwards)")
    parser.add_argument("--weights", help="weights file for the service's predictors")
    parser.add_argument("--service-metrics-port", type=int, help="Prometheus port of the service (default: none)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="set any key of the configuration in both runs, e.g. zero_optimization.stage=3 (repeatable)",
    )
    return parser


def _environment(num_ranks: int) -> dict[str, str]:
    import torch

    environment = dict(os.environ)
    # DeepSpeed's build of its CPU operator looks for ninja on the path, and it is installed beside the interpreter.
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    environment.setdefault("OMP_NUM_THREADS", "1")
    if torch.cuda.device_count() < num_ranks:
        environment["DS_ACCELERATOR"] = "cpu"
        if shutil.which("g++", path=environment["PATH"]) is None:
            raise ConfigError("g++ is not installed; DeepSpeed needs it on a CPU to compile an operator")
    return environment


def _note_lock(environment: Mapping[str, str]) -> None:
    if lock := find_lock(environment):
        _say(f"training waits for whoever compiles DeepSpeed's operator; if nobody does, remove {lock}")


def _start_service(
    children: Children, out: Path, arguments: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[Child, str]:
    port_file = out / "service.address"
    command = [sys.executable, "-m", "sidecast.commands", "serve", "--port", "0"]
    command += ["--port-file", str(port_file)]
    if arguments.weights is not None:
        command += ["--weights", arguments.weights]
    if arguments.service_metrics_port is not None:
        command += ["--metrics-port", str(arguments.service_metrics_port)]
    service = children.start("the nowcaster service", command, out / SERVICE_LOG, environment)
    deadline_s = time.monotonic() + SERVICE_START_TIMEOUT_S
    while not (port_file.exists() and (address := port_file.read_text().strip())):
        if service.process.poll() is not None:
            raise service.failure()
        if time.monotonic() > deadline_s:
            raise ChildFailedError(
                f"{service.name} was not ready after {SERVICE_START_TIMEOUT_S:.0f} s (its log: {service.log_path})"
            )
        time.sleep(POLL_INTERVAL_S)
    return service, address


def _training_command(
    arguments: argparse.Namespace, run_dir: Path, num_steps: int, settings: Sequence[str]
) -> list[str]:
    # `python -m deepspeed.launcher.runner` is what the script `deepspeed` runs; that one need not be on the path.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(arguments.num_ranks)]
    command += ["--master_port", str(_free_port()), "--module", "sidecast.trainer.main"]
    command += ["--config", arguments.config, "--steps", str(num_steps), "--run-dir", str(run_dir)]
    for setting in [*arguments.set, *settings]:
        command += ["--set", setting]
    return command


def _train(
    children: Children,
    name: str,
    command: Sequence[str],
    run_dir: Path,
    num_steps: int,
    environment: Mapping[str, str],
    service: Child | None = None,
) -> None:
    child = children.start(name, command, run_dir.with_suffix(".log"), environment)
    bar = ProgressBar(name, num_steps, sys.stderr)
    warned = False
    try:
        for record in _follow(run_dir / METRICS_NAME, child):
            # What happens to every single snapshot is in the metrics; here it would bury the jumps.
            if record["kind"] != "nowcast" or record["event"] not in ("staged", "committed"):
                bar(record)
            if service is not None and service.process.poll() is not None and not warned:
                warned = True
                _say(f"training goes on without nowcasts, because {service.failure()}")
    finally:
        bar.close()
        # They have no other name, and go on being used by whoever has them.
        free_shared_buffers(command[command.index("--master_port") + 1])
    if child.process.wait() != 0:
        raise child.failure()
    children.end(child)


def _follow(path: Path, child: Child) -> Iterator[Record]:
    """The records of a run as they are written, until the run ends."""
    num_seen = 0
    while True:
        # Asked before reading, so that what was written last is still read.
        has_ended = child.process.poll() is not None
        records: list[Record] = list(read_records(path)) if path.exists() else []
        yield from records[num_seen:]
        num_seen = len(records)
        if has_ended:
            return
        time.sleep(POLL_INTERVAL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _leave(number: int, frame: FrameType | None) -> Any:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
