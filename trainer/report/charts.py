"""Loss curves as SVG for the report and as PNG for everywhere else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from sidecast.trainer.report.comparison import Point

WIDTH, HEIGHT = 920, 400
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 16, 44
PNG_COLOURS = {"nowcast": "#c2410c", "baseline": "#1d4ed8", "other": "#737373"}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: What the legend and the tooltip call it.
        points: Pairs of an optimizer step and the loss there.
        style: Its CSS class: ``nowcast``, ``baseline`` or ``other``, and ``faint`` for lines in the background.
        dotted: Draw the points too, each with a tooltip.
    """

    name: str
    points: Sequence[Point]
    style: str
    dotted: bool = False


def svg_chart(
    curves: Sequence[Curve], jump_steps: Sequence[float], from_step: float = 0.0, *, axis: str = "step"
) -> str:
    """Draws curves over steps, with a vertical mark at every jump.

    Args:
        curves: Any number; what is not finite is left out.
        jump_steps: Where nowcasts were applied.
        from_step: Left end of the chart; what is before is cut off, so that the rest has room.
        axis: What the points are over.

    Returns:
        An ``svg`` element, coloured by the page's CSS; a sentence if there is nothing to draw.
    """
    shown = [[point for point in curve.points if point[0] >= from_step] for curve in curves]
    everything = [point for points in shown for point in points if math.isfinite(point[1])]
    if not everything:
        return f"<p>Nothing was measured from {axis} {from_step:,.0f} on.</p>"
    low_x, high_x = from_step, max(step for step, _ in everything)
    low_y, high_y = min(loss for _, loss in everything), max(loss for _, loss in everything)
    margin = 0.04 * (high_y - low_y) or 0.01
    low_y, high_y = low_y - margin, high_y + margin

    def x(step: float) -> float:
        return LEFT + (step - low_x) / max(high_x - low_x, 1e-9) * (WIDTH - LEFT - RIGHT)

    def y(loss: float) -> float:
        return TOP + (high_y - loss) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="loss by {axis}">']
    for tick in ticks(low_y, high_y):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(low_x, high_x):
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick:,.0f}</text>'
        )
    for number, step in enumerate(jump_steps, start=1):
        if step >= from_step:
            parts.append(
                f'<g class="jump"><line x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                f'<text x="{x(step) + 3:.1f}" y="{TOP + 10}">{number}</text>'
                f"<title>nowcast {number} applied at step {step:,.0f}</title></g>"
            )
    for curve, points in zip(curves, shown, strict=True):
        path = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in points if math.isfinite(loss))
        parts.append(f'<polyline class="{curve.style}" points="{path}"/>')
        if curve.dotted:
            for step, loss in points:
                parts.append(
                    f'<circle class="{curve.style}" cx="{x(step):.1f}" cy="{y(loss):.1f}" r="2.6">'
                    f"<title>{escape(curve.name)}, {axis} {step:,.0f}: {loss:.4f}</title></circle>"
                )
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{axis}</text></svg>'
    )
    return "".join(parts)


def write_png(path: Path, curves: Sequence[Curve], jump_steps: Sequence[float], title: str) -> None:
    """Draws the same chart with matplotlib."""
    # Without a display, and without touching the backend of a session that imports us.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for curve in curves:
        faint = "faint" in curve.style
        axes.plot(
            *zip(*curve.points, strict=True),
            color=PNG_COLOURS[curve.style.split()[0]],
            alpha=0.35 if faint else 1.0,
            linewidth=1.0 if faint else 1.8,
            marker="o" if curve.dotted else None,
            markersize=3,
            label=curve.name,
        )
    for index, step in enumerate(jump_steps):
        axes.axvline(
            step,
            color="#737373",
            linestyle=(0, (3, 3)),
            linewidth=1,
            zorder=0,
            label=None if index else "jump applied",
        )
    # The first steps fall from the loss of a random model and would flatten everything after them.
    late = [loss for curve in curves for step, loss in curve.points if step >= 0.05 * curve.points[-1][0]]
    if finite := [loss for loss in late if math.isfinite(loss)]:
        axes.set_ylim(min(finite) - 0.05, max(finite) + 0.05)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)


def ticks(low: float, high: float, num_ticks: int = 6) -> Iterator[float]:
    """Round numbers between two ends, about ``num_ticks`` of them."""
    rough = (high - low) / num_ticks
    magnitude = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if magnitude * factor >= rough)
    for index in range(math.ceil(low / step), math.floor(high / step) + 1):
        yield index * step
