"""A run, or two side by side, as a page: ``python -m sidecast.trainer.report RUN [--baseline RUN] --out DIR``."""

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
    parser.add_argument("--out", type=Path, required=True, help="where to write")
    arguments = parser.parse_args(argv)
    try:
        summary = write_report(arguments.run, arguments.baseline, arguments.out)
    except SidecastError as error:
        sys.stderr.write(f"sidecast: error: {error}\n")
        return 2
    sys.stdout.write(summary + "\n")
    return 0


def write_report(run_dir: Path, baseline_dir: Path | None, out: Path) -> str:
    """Writes ``report.html`` and ``loss.png`` into ``out``.

    Args:
        run_dir: The run, usually with nowcasts.
        baseline_dir: The run it is compared with, usually the same without them; None for none.
        out: A directory; it is created.

    Returns:
        The summary as a table of text.

    Raises:
        ConfigError: A run has no metrics.
    """
    curves = _read(run_dir)
    baseline = None if baseline_dir is None else _read(baseline_dir)
    out.mkdir(parents=True, exist_ok=True)
    chart, jump_steps = _curves(curves, baseline), [float(jump["step"]) for jump in curves.jumps]
    judged = None if baseline is None else verdict(curves, baseline)
    sentence = judged.sentence if judged is not None else "One run, with nothing to compare it with."
    rows = _summary_rows(curves, baseline)
    write_png(out / "loss.png", chart, jump_steps, "Loss by step")
    template = Template(resources.files(__package__).joinpath("templates", "report.html").read_text())
    page = template.substitute(
        verdict=escape(sentence),
        verdict_class="saved" if judged is not None and judged.has_saved else "lost",
        caveat=escape(_caveat(curves, baseline)),
        chart=svg_chart(chart, jump_steps, from_step=0.05 * curves.train[-1][0]),
        chart_late=svg_chart(
            [curve for curve in chart if curve.dotted], jump_steps, from_step=0.5 * curves.train[-1][0]
        ),
        legend=_legend(chart),
        summary=_table(rows),
        jumps=_jump_table(curves),
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


def _curves(curves: RunCurves, baseline: RunCurves | None) -> list[Curve]:
    window = max(1, int(SMOOTHING_SHARE * len(curves.train)))
    chart = []
    if baseline is not None:
        chart.append(Curve(name="without, training", points=smoothed(baseline.train, window), style="baseline faint"))
    name = "with nowcasts" if curves.jumps or baseline is not None else "run"
    chart.append(Curve(name=f"{name}, training", points=smoothed(curves.train, window), style="nowcast faint"))
    if baseline is not None and baseline.validation:
        chart.append(Curve(name="without, validation", points=baseline.validation, style="baseline", dotted=True))
    if curves.validation:
        chart.append(Curve(name=f"{name}, validation", points=curves.validation, style="nowcast", dotted=True))
    return chart


def _summary_rows(curves: RunCurves, baseline: RunCurves | None) -> list[Row]:
    rows: list[Row] = []
    runs = [("with nowcasts", curves)] + ([] if baseline is None else [("without", baseline)])
    for name, run in runs:
        best_step, best_loss = min(run.validation, key=lambda point: point[1]) if run.validation else run.train[-1]
        rows.append((f"best validation loss, {name}", f"{best_loss:.4f} at step {best_step:,.0f}"))
        rows.append((f"training time, {name}", f"{run.training_s:.1f} s, {run.train[-1][0]:,.0f} steps"))
    cost = nowcast_cost(curves)
    if cost is None:
        return rows
    counts = ("applied", "accepted", "rolled_back", "rejected", "dropped")
    rows.append(("nowcasts", ", ".join(f"{curves.num_events(event)} {event.replace('_', ' ')}" for event in counts)))
    if curves.jumps:
        weights = [jump["details"]["weight"] for jump in curves.jumps]
        rows.append(("weight of the jumps", f"{min(weights):.2f} to {max(weights):.2f}"))
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
    parts = ["One seed and one small model: an illustration, not a measurement of how well nowcasting works."]
    schedule = curves.run.get("training", {}).get("schedule", {}).get("kind")
    if schedule == "constant":
        parts.append(
            "Both runs keep the learning rate constant. Letting it decay often gains more than nowcasting does, "
            "and leaves less to gain: compare with --set training.schedule.kind=cosine."
        )
    steps, baseline_steps = curves.train[-1][0], baseline.train[-1][0]
    if steps != baseline_steps:
        parts.append(f"The runs are of different length ({steps:,} and {baseline_steps:,} steps).")
    if differs is None:
        parts.append("The training losses of both runs are equal bit for bit, as far as both go.")
    elif curves.jumps:
        jump_step = curves.jumps[0]["step"]
        parts.append(
            f"Up to the first jump at step {jump_step:,} the two runs are "
            + ("equal bit for bit." if differs > jump_step else f"not equal: they differ from step {differs:,.0f} on.")
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


def _table(rows: Iterable[Row]) -> str:
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table><tbody>{body}</tbody></table>"


def _legend(curves: Sequence[Curve]) -> str:
    items = [f'<span><i class="{curve.style}"></i>{escape(curve.name)}</span>' for curve in curves]
    return "".join([*items, '<span><i class="mark"></i>nowcast applied</span>'])


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


if __name__ == "__main__":
    sys.exit(main())
