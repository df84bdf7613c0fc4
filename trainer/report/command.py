"""``sidecast report``: several runs side by side, as one page that needs nothing else."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from sidecast.atomic_files import replacing
from sidecast.errors import ConfigError, one_line, printable
from sidecast.trainer.job.run_log import METRICS_NAME, read_records
from sidecast.trainer.report.charts import Curve, svg_chart
from sidecast.trainer.report.comparison import Point, RunCurves, nowcast_cost, smoothed
from sidecast.trainer.report.several import Fairness, NamedRun, fairness, outcome, reference_of

NUM_COLOURS = 8
SMOOTHING_SHARE = 0.02
# The first steps fall from the loss of a random model and would flatten everything after them.
CUT_SHARE = 0.05
LONG_CHARACTERS = 40


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "report",
        help="compare training runs on one page",
        description="Compares runs of the training job by their metrics: losses by step, by tokens and by time, how "
        "many steps one of them would have needed for the others' losses, and what nowcasting cost. The page is one "
        "file, and says where the comparison is not fair.",
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help=f"run directory, or its {METRICS_NAME}; names are the folders'",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="RUN",
        help="one of them (default: the first without nowcasts, or else the first)",
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the page, and prints what it says first.

    Returns:
        The exit status, 0.

    Raises:
        ConfigError: A run cannot be read or has no steps, or the page cannot be written.
    """
    runs = read_runs(args.runs)
    reference = reference_of(runs)
    if args.baseline is not None:
        places = {path.absolute(): run for path, run in zip(args.runs, runs, strict=True)}
        if args.baseline.absolute() not in places:
            given = ", ".join(f"{path}" for path in args.runs)
            raise ConfigError(f"--baseline is {args.baseline}; allowed: one of the runs ({given})")
        reference = places[args.baseline.absolute()]
    found = fairness(runs, reference)
    try:
        with replacing(args.out) as partial:
            partial.write_text(page_of(runs, reference, found), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out {args.out} cannot be written: {one_line(error)}") from error
    lines = [verdict_of(runs, reference, found), *(f"  {doubt}" for doubt in (*found.losses, *found.causes))]
    sys.stdout.write("\n".join(map(printable, [*lines, f"written to {args.out}"])) + "\n")
    return 0


def read_runs(paths: Sequence[Path]) -> list[NamedRun]:
    """Reads what runs have written, and names them apart.

    Raises:
        ConfigError: One has no metrics, none that can be read, or no steps.
    """
    files = [path / METRICS_NAME if path.is_dir() else path for path in paths]
    folders = [file.absolute().parent for file in files]
    runs = []
    for path, file, folder in zip(paths, files, folders, strict=True):
        is_alone = sum(other.name == folder.name for other in folders) == 1
        name = folder.name if is_alone else f"{folder.parent.name}/{folder.name}"
        try:
            records = tuple(read_records(file))
            curves = RunCurves.of(records)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not what a training job writes"
            raise ConfigError(f"run {path} cannot be read: {file.name}: {reason}") from error
        if not curves.train:
            raise ConfigError(f"run {path} has no training steps yet")
        runs.append(NamedRun(name, curves, records))
    if len({run.name for run in runs}) < len(runs):
        raise ConfigError(f"two runs are {', '.join(run.name for run in runs)}; allowed: each of them once")
    return runs


def verdict_of(runs: Sequence[NamedRun], reference: NamedRun, found: Fairness) -> str:
    """The page's first sentence."""
    if len(runs) == 1:
        return f"One run, {reference.name}, with nothing to compare it with."
    if found.losses:
        return "No comparison: these losses do not mean the same."
    if found.causes:
        return f"Not a fair comparison with {reference.name}: more differs between the runs than their nowcasts."
    return f"A fair comparison with {reference.name}, as far as the records tell: nothing but nowcasts differs."


def page_of(runs: Sequence[NamedRun], reference: NamedRun, found: Fairness) -> str:
    """The page, as HTML."""
    templates = resources.files(__package__).joinpath("templates")
    template = Template(templates.joinpath("several.html").read_text("utf-8"))
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} training runs"
    return template.substitute(
        style=templates.joinpath("report.css").read_text("utf-8"),
        title=escape(title),
        subtitle=escape(", ".join(run.name for run in runs) if len(runs) > 1 else "Written by sidecast report."),
        verdict=escape(verdict_of(runs, reference, found)),
        verdict_class="saved" if found.is_fair and len(runs) > 1 else "lost",
        doubts=_doubts(found),
        legend=_legend(runs),
        by_step=_chart(runs, "step", lambda run, points: tuple(points)),
        by_tokens=_chart(runs, "tokens", NamedRun.by_tokens),
        by_time=_chart(runs, "seconds", NamedRun.by_time) + _list("", found.times),
        read_outs=_read_outs(runs),
        losses=_loss_table(runs, reference),
        costs=_cost_table(runs),
        settings=_setting_table(runs),
    )


def _style(index: int) -> str:
    return f"run{index % NUM_COLOURS}" + (" dashed" if index >= NUM_COLOURS else "")


def _chart(runs: Sequence[NamedRun], axis: str, over: Callable[[NamedRun, Sequence[Point]], Sequence[Point]]) -> str:
    curves = []
    for index, run in enumerate(runs):
        train = over(run, smoothed(run.curves.train, max(1, int(SMOOTHING_SHARE * len(run.curves.train)))))
        curves.append(Curve(name=f"{run.name}, training", points=train, style=f"{_style(index)} faint"))
    for index, run in enumerate(runs):
        points = over(run, run.curves.validation)
        if points:
            curves.append(Curve(name=f"{run.name}, validation", points=points, style=_style(index), dotted=True))
    ends = [curve.points[-1][0] for curve in curves if curve.points]
    if not ends:
        return f'<p class="muted">No run says how many {escape(axis)} there were.</p>'
    missing = [run.name for run in runs if not over(run, run.curves.train)]
    said = f'<p class="muted">Without {escape(", ".join(missing))}, of which it is not known.</p>' if missing else ""
    return svg_chart(curves, (), CUT_SHARE * max(ends), axis=axis) + said


def _read_outs(runs: Sequence[NamedRun]) -> str:
    curves = [
        Curve(name=f"{run.name}, {name}", points=points, style=_style(index), dotted=True)
        for index, run in enumerate(runs)
        for name, points in run.read_outs.items()
    ]
    if not curves:
        return ""
    legend = "".join(f'<span><i class="{curve.style}"></i>{escape(curve.name)}</span>' for curve in curves)
    return f'<section><h2>Read-outs</h2><div class="legend">{legend}</div>{svg_chart(curves, ())}</section>'


def _legend(runs: Sequence[NamedRun]) -> str:
    items = [f'<span><i class="{_style(index)}"></i>{escape(run.name)}</span>' for index, run in enumerate(runs)]
    return "".join(items) + "<span>dots: validation; thin lines: training</span>"


def _doubts(found: Fairness) -> str:
    return (
        _list("Losses do not mean the same:", found.losses)
        + _list("What else differs:", found.causes)
        + _list("In any case:", found.limits)
    )


def _list(title: str, items: Iterable[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f'{head}<ul class="muted">{lines}</ul>' if lines else ""


def _loss_table(runs: Sequence[NamedRun], reference: NamedRun) -> str:
    rows = []
    for run in runs:
        found = outcome(run, reference)
        difference = "" if found.difference is None else f"{found.difference:+.4f} (step {found.at_step:,.0f})"
        steps = found.why_not if found.equivalent_steps is None else f"{found.equivalent_steps:,.0f}"
        kind = "validation" if run.curves.validation else "training"
        rows.append(
            (
                run.name,
                kind,
                f"{found.last_loss:.4f}",
                f"{found.best_loss:.4f}",
                f"{found.best_step:,.0f}",
                difference,
                steps,
            )
        )
    head = ("", "loss", "at its end", "best", "at step", f"minus {reference.name}", f"{reference.name} needs steps")
    return _table(head, rows)


def _cost_table(runs: Sequence[NamedRun]) -> str:
    rows = []
    for run in runs:
        curves, cost = run.curves, nowcast_cost(run.curves)
        rates = sorted(
            item["tokens_per_s"] for item in run.records if item["kind"] == "train" and "tokens_per_s" in item
        )
        counts = ("applied", "rejected", "dropped") if curves.has_pushes else ("applied", "rolled_back", "dropped")
        made = ", ".join(f"{curves.num_events(event)} {event.replace('_', ' ')}" for event in counts)
        rows.append(
            (
                run.name,
                f"{curves.train[-1][0]:,.0f}",
                f"{curves.training_s:,.1f} s",
                f"{rates[len(rates) // 2]:,.0f}" if rates else "not told",
                ("pushes: " if curves.has_pushes else "jumps: ") + made if run.has_nowcasts else "none",
                "" if cost is None else f"{cost.blocked_s:.2f} s ({cost.blocked_share:.2%})",
                "" if cost is None else f"{(cost.bytes_uploaded + cost.bytes_fetched) / 2**20:,.0f} MiB",
            )
        )
    head = ("", "steps", "training", "tokens/s, median", "nowcasts", "a rank was stalled", "on the wire")
    return _table(head, rows)


def _setting_table(runs: Sequence[NamedRun]) -> str:
    def schedule(settings: dict[str, object]) -> str:
        return ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)

    rows = []
    for run in runs:
        settings = run.curves.run
        if not settings:
            rows.append((run.name, *[""] * 7))
            continue
        training, ds_config = settings["training"], settings["deepspeed"]
        tokens = run.tokens_per_step
        rows.append(
            (
                run.name,
                f"{settings['num_parameters']:,}",
                f"{settings['num_ranks']}",
                "" if tokens is None else f"{tokens:,}",
                json.dumps(ds_config.get("optimizer", {})),
                schedule(training["schedule"]),
                f"{training.get('seed', '')}",
                json.dumps(ds_config.get("nowcaster", {})) if "nowcaster" in ds_config else "none",
            )
        )
    head = ("", "parameters", "ranks", "tokens a step", "optimizer", "schedule", "seed", "nowcaster")
    return _table(head, rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of runs in their order, each with its colour."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = []
    for index, (name, *cells) in enumerate(rows):
        first = f'<td><i class="{_style(index)}"></i>{escape(name)}</td>'
        kinds = ["long" if len(cell) > LONG_CHARACTERS else "number" for cell in cells]
        others = [f'<td class="{kind}">{escape(cell)}</td>' for kind, cell in zip(kinds, cells, strict=True)]
        lines.append("<tr>" + first + "".join(others) + "</tr>")
    return f"<table><thead><tr>{names}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
