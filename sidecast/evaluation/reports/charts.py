"""Losses as dots with intervals, one chart for a setting, as inline SVG."""

from __future__ import annotations

import html
import math

from sidecast.evaluation.analysis import Results, Setting, interval
from sidecast.evaluation.read_outs import RAW
from sidecast.evaluation.reports.tables import READ_OUTS

_LEFT, _WIDTH, _ROW, _TOP = 260, 560, 20, 40
_COLOURS = {"raw": "#1b6ca8", "ema2": "#e07b39", "ema5": "#3a9d5d", "ema10": "#8c5fb0", "ema20": "#b0413e"}


def loss_chart(results: Results, setting: Setting) -> str:
    """Every arm's final loss by read-out: each seed a small dot, the mean a large one with its 95 % interval.

    Args:
        results: Of a farm.
        setting: Which of its runs.
    """
    rows = []
    for arm in results.arms(setting):
        for read_out in READ_OUTS:
            runs = results.runs(setting, arm, read_out)
            losses = [] if runs is None else [loss for loss in runs.tuned().values() if math.isfinite(loss)]
            if losses:
                rows.append((arm, read_out, losses))
    if not rows:
        return ""
    everything = [loss for _, _, losses in rows for loss in losses]
    low, high = min(everything), max(everything)
    margin = 0.05 * (high - low) or 0.01
    low, high = low - margin, high + margin

    def x(loss: float) -> float:
        return _LEFT + _WIDTH * (min(max(loss, low), high) - low) / (high - low)

    height = _TOP + _ROW * len(rows) + 30
    title = html.escape(f"{setting.task}, {setting.schedule}, {setting.num_steps:,} steps: final validation loss")
    parts = [
        f'<svg role="img" aria-label="{title}" viewBox="0 0 {_LEFT + _WIDTH + 40} {height}" width="100%" '
        f'font-family="system-ui,sans-serif" font-size="12"><text x="0" y="18" font-size="15">{title}</text>'
    ]
    for index in range(6):
        value = low + (high - low) * index / 5
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="{_TOP - 8}" y2="{height - 22}" stroke="#ddd"/>'
            f'<text x="{x(value):.1f}" y="{height - 6}" text-anchor="middle">{value:.3f}</text>'
        )
    for index, (arm, read_out, losses) in enumerate(rows):
        y = _TOP + _ROW * (index + 0.5)
        colour = _COLOURS[read_out]
        label = html.escape(f"{arm[:30]}{'' if read_out == RAW else ', ' + read_out}")
        whole = interval(losses)
        parts.append(f'<text x="{_LEFT - 10}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        parts += [f'<circle cx="{x(loss):.1f}" cy="{y:.1f}" r="2" fill="{colour}" opacity=".5"/>' for loss in losses]
        parts.append(
            f'<line x1="{x(whole.low):.1f}" x2="{x(whole.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}" '
            f'stroke-width="2"/><circle cx="{x(whole.mean):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
            if len(losses) > 1
            else f'<circle cx="{x(whole.mean):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
        )
    return "".join(parts) + "</svg>"
