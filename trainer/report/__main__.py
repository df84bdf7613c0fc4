"""Runs side by side, as a page: ``python -m sidecast.trainer.report RUN [--baseline RUN] [--beside RUN] --out DIR``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from sidecast.errors import ConfigError, SidecastError
from sidecast.trainer.job.run_log import METRICS_NAME, read_records
from sidecast.trainer.report.charts import Curve, svg_chart, write_png
from sidecast.trainer.report.comparison import RunCurves, first_difference, nowcast_cost, smoothed, verdict

Row = tuple[str, str]
SMOOTHING_SHARE = 0.02


def main(argv: Sequence[str] | None = None) -> int:
    """Writes a report about runs that are there."""
    parser = argparse.ArgumentParser(
        prog="python -m sidecast.trainer.report",
        description="Writes report.html and loss.png about a training run, compared with another one if given.",
    )
    parser.add_argument("run", type=Path, help="run directory (with its metrics.jsonl)")
    parser.add_argument("--baseline", type=Path, help="run directory to compare with, e.g. the same without nowcasts")
    parser.add_argument(
        "--beside",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="further run directories to show and not to judge by, e.g. of another learning rate",
    )
    parser.add_argument("--out", type=Path, required=True, help="where to write")
    arguments = parser.parse_args(argv)
    try:
        summary = write_report(arguments.run, arguments.baseline, arguments.out, arguments.beside)
    except SidecastError as error:
        sys.stderr.write(f"sidecast: error: {error}\n")
        return 2
    sys.stdout.write(summary + "\n")
    return 0


def write_report(run_dir: Path, baseline_dir: Path | None, out: Path, beside: Sequence[Path] = ()) -> str:
    """Writes ``report.html`` and ``loss.png`` into ``out``.

    Args:
        run_dir: The run, usually with nowcasts.
        baseline_dir: The run it is compared with, usually the same without them; None for none.
        out: A directory; it is created.
        beside: Further runs, which are shown by their directories' names, and judge nothing.

    Returns:
        The summary as a table of text.

    Raises:
        ConfigError: A run has no metrics.
    """
    curves = _read(run_dir)
    baseline = None if baseline_dir is None else _read(baseline_dir)
    others = [(path.name.replace("_", " "), _read(path)) for path in beside]
    out.mkdir(parents=True, exist_ok=True)
    chart, jump_steps = _curves(curves, baseline, others), [float(jump["step"]) for jump in curves.jumps]
    judged = None if baseline is None else verdict(curves, baseline)
    sentence = judged.sentence if judged is not None else "One run, with nothing to compare it with."
    rows = _summary_rows(curves, baseline, others)
    write_png(out / "loss.png", chart, jump_steps, "Loss by step")
    templates = resources.files(__package__).joinpath("templates")
    page = Template(templates.joinpath("report.html").read_text("utf-8")).substitute(
        style=templates.joinpath("report.css").read_text("utf-8"),
        verdict=escape(sentence),
        verdict_class="saved" if judged is not None and judged.has_saved else "lost",
        caveat=escape(_caveat(curves, baseline)),
        chart=svg_chart(chart, jump_steps, from_step=0.05 * curves.train[-1][0]),
        chart_late=svg_chart(
            [curve for curve in chart if curve.dotted], jump_steps, from_step=0.5 * curves.train[-1][0]
        ),
        legend=_legend(chart, bool(jump_steps)),
        summary=_table(rows),
        nowcasts=_push_table(curves) if curves.has_pushes else _jump_table(curves),
        settings=_table(_setting_rows(curves)),
        config=escape(json.dumps(curves.run.get("deepspeed", {}), indent=2)),
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    width = max(len(name) for name, _ in rows)
    lines = [*(f"{name:<{width}}  {value}" for name, value in rows), "", sentence, _caveat(curves, baseline)]
    return "\n".join(lines).rstrip()


def _read(run_dir: Path) -> RunCurves:
    path = run_dir / METRICS_NAME
    if not path.is_file():
        raise ConfigError(f"run {str(run_dir)!r} has no {METRICS_NAME}; give the run directory of a training job")
    curves = RunCurves.of(read_records(path))
    if not curves.train:
        raise ConfigError(f"{path} has no training steps; the run ended before the first one was logged")
    return curves


def _curves(curves: RunCurves, baseline: RunCurves | None, others: Sequence[tuple[str, RunCurves]]) -> list[Curve]:
    window = max(1, int(SMOOTHING_SHARE * len(curves.train)))
    chart = [
        Curve(name=f"{name}, validation", points=other.validation, style="other", dotted=True)
        for name, other in others
        if other.validation
    ]
    if baseline is not None:
        chart.append(Curve(name="without, training", points=smoothed(baseline.train, window), style="baseline faint"))
    name = "with nowcasts" if curves.applied or baseline is not None else "run"
    chart.append(Curve(name=f"{name}, training", points=smoothed(curves.train, window), style="nowcast faint"))
    if baseline is not None and baseline.validation:
        chart.append(Curve(name="without, validation", points=baseline.validation, style="baseline", dotted=True))
    if curves.validation:
        chart.append(Curve(name=f"{name}, validation", points=curves.validation, style="nowcast", dotted=True))
    return chart


def _summary_rows(curves: RunCurves, baseline: RunCurves | None, others: Sequence[tuple[str, RunCurves]]) -> list[Row]:
    runs = [("with nowcasts", curves), *([] if baseline is None else [("without", baseline)]), *others]
    rows: list[Row] = []
    for name, run in runs:
        best_step, best_loss = min(run.validation, key=lambda point: point[1]) if run.validation else run.train[-1]
        rows.append((f"best validation loss, {name}", f"{best_loss:.4f} at step {best_step:,.0f}"))
    for name, run in runs:
        rows.append((f"training time, {name}", f"{run.training_s:.1f} s, {run.train[-1][0]:,.0f} steps"))
    cost = nowcast_cost(curves)
    if cost is None:
        return rows
    verdicts = [] if curves.has_pushes else ["accepted", "rolled_back"]
    counts = ["applied", *verdicts, "rejected", "dropped"]
    kind = "pushes" if curves.has_pushes else "jumps"
    rows.append((kind, ", ".join(f"{curves.num_events(event)} {event.replace('_', ' ')}" for event in counts)))
    if curves.applied:
        weights = [nowcast["details"]["weight"] for nowcast in curves.applied]
        rows.append((f"weight of the {kind}", f"{min(weights):.2f} to {max(weights):.2f}"))
    if cost.nowcast_s:
        rows.append(
            (
                "seconds per nowcast",
                f"{sum(cost.nowcast_s) / len(cost.nowcast_s):.3f} mean, {max(cost.nowcast_s):.3f} most",
            )
        )
    rows += [
        ("staging", f"{cost.staging_s:.3f} s in all, on the slowest rank"),
        (
            "on the wire",
            f"{_mebibytes(cost.bytes_uploaded)} snapshots up, {_mebibytes(cost.bytes_fetched)} predictions down",
        ),
        (
            "a rank was blocked",
            f"{cost.blocked_s:.3f} s, {cost.blocked_share:.3%} of its training time",
        ),
    ]
    return rows


def _setting_rows(curves: RunCurves) -> list[Row]:
    run = curves.run
    if not run:
        return []
    training, ds_config = run["training"], run["deepspeed"]
    return [
        ("parameters", f"{run['num_parameters']:,}"),
        ("ranks, ZeRO stage", f"{run['num_ranks']}, {ds_config.get('zero_optimization', {}).get('stage', 0)}"),
        ("corpus", f"{training['data']['corpus']}, tokenizer {training['data']['tokenizer']}"),
        ("tokens", f"{run['num_train_tokens']:,} for training, {run['num_validation_tokens']:,} held out"),
        ("sequence length", f"{training['data']['sequence_length']}"),
        (
            "batch",
            f"{ds_config['train_micro_batch_size_per_gpu']} sequences x {run['num_ranks']} ranks x "
            f"{ds_config.get('gradient_accumulation_steps', 1)} accumulated",
        ),
        ("optimizer", json.dumps(ds_config["optimizer"])),
        ("schedule", f"{training['schedule']['kind']}, {training['schedule']['warmup_steps']} steps of warm-up"),
        ("seed", f"{training['seed']}"),
        ("machine", f"{run['machine']['system']}, {run['machine']['num_cores']} cores"),
        ("versions", ", ".join(f"{name} {version}" for name, version in run["versions"].items())),
    ]


def _caveat(curves: RunCurves, baseline: RunCurves | None) -> str:
    if baseline is None:
        return ""
    differs = first_difference(curves, baseline)
    parts = [
        "One seed and one model: an illustration. Whether nowcasting pays takes many seeds, and a learning rate that "
        "is tuned on both sides: sidecast evaluate."
    ]
    if curves.schedule == "constant":
        parts.append(
            "Both runs keep the learning rate constant. Letting it decay often gains more than nowcasting does, "
            "and leaves less to gain: compare with --set training.schedule.kind=cosine."
        )
    steps, baseline_steps = curves.train[-1][0], baseline.train[-1][0]
    if steps != baseline_steps:
        parts.append(f"The runs are of different length ({steps:,} and {baseline_steps:,} steps).")
    if differs is None:
        parts.append("The training losses of both runs are equal bit for bit, as far as both go.")
    elif curves.applied:
        kind, first_step = "push" if curves.has_pushes else "jump", curves.applied[0]["step"]
        parts.append(
            f"Up to the first {kind} at step {first_step:,} the two runs are "
            + ("equal bit for bit." if differs > first_step else f"not equal: they differ from step {differs:,.0f} on.")
        )
    return " ".join(parts)


def _jump_table(curves: RunCurves) -> str:
    if not curves.jumps:
        return "<p>No nowcast was applied.</p>"
    outcomes = {
        record["details"].get("version"): record["event"].replace("_", " ")
        for record in curves.events
        if record["event"] in ("accepted", "rolled_back")
    }
    settings = curves.run.get("deepspeed", {}).get("nowcaster", {})
    is_judged = settings.get("rollback") != "off" and settings.get("probation_steps") != 0
    head = ("", "applied at step", "from step", "stale for", "horizon", "weight", "relative size", "outcome")
    lines = ["<table><thead><tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr></thead><tbody>"]
    for number, jump in enumerate(curves.jumps, start=1):
        details = jump["details"]
        cells = (
            f"{number}",
            f"{jump['step']:,}",
            f"{details['base_step']:,}",
            f"{details['staleness_steps']} steps",
            f"{details['horizon_intervals']} intervals",
            f"{details['weight']:.2f}",
            f"{details['relative_norm']:.4f}" if "relative_norm" in details else "",
            outcomes.get(details["version"], "on probation at the end" if is_judged else "not judged"),
        )
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    return "".join([*lines, "</tbody></table>"])


def _push_table(curves: RunCurves) -> str:
    """All pushes in a few rows: there are hundreds, and none is judged alone."""
    if not curves.applied:
        return "<p>No push was applied.</p>"
    details = [push["details"] for push in curves.applied]
    stale = sorted(push["staleness_steps"] for push in details)
    rows: list[Row] = [
        ("applied", f"{len(details)}, from step {curves.applied[0]['step']:,} to {curves.applied[-1]['step']:,}"),
        ("steps from snapshot to push", f"{stale[len(stale) // 2]} in the median, {stale[-1]} at most"),
        ("weight", f"{sum(push['weight'] for push in details) / len(details):.2f} on average"),
    ]
    if all("relative_norm" in push for push in details):
        most = max(push["relative_norm"] for push in details)
        rows.append(("largest push relative to the weights", f"{most:.4f}"))
    ends = [event for event in curves.events if event["event"] == "suspended"]
    reason = f"yes, at step {ends[0]['step']:,}: {ends[0]['details'].get('reason', '')}" if ends else "no"
    rows.append(("ended by the guard", reason))
    return _table(rows)


def _table(rows: Iterable[Row]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table><tbody>{body}</tbody></table>"


def _legend(curves: Sequence[Curve], has_jumps: bool) -> str:
    items = [f'<span><i class="{curve.style}"></i>{escape(curve.name)}</span>' for curve in curves]
    return "".join([*items, *(['<span><i class="mark"></i>jump applied</span>'] if has_jumps else [])])


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
