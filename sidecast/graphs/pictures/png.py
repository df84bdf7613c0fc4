"""A picture of a topology as a PNG, drawn by matplotlib."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Any

from sidecast.errors import ConfigError
from sidecast.graphs.pictures.picture import EDGE_COLOURS, MAP_PX, Picture, arrange, short_name
from sidecast.graphs.pictures.weight_colours import ReadTensor, weight_raster
from sidecast.graphs.topology import Topology

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INCH_PX = 90.0
# Deeper models repeat themselves; a page shows their beginning.
_LARGEST_FLOW_PX = 2600.0
_BAND_WIDTH = 12.0


def picture_png(topology: Topology, read: ReadTensor | None = None) -> bytes:
    """Draws a topology.

    Args:
        topology: Any size.
        read: Where weights come from, to colour the map by; None draws edge types alone.

    Returns:
        The encoded image: the flow (its beginning, if the model is deep) above the adjacency map.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("drawing a PNG needs matplotlib: pip install matplotlib, or draw HTML instead") from error
    picture = arrange(topology)
    flow_width = min(picture.flow_width, _LARGEST_FLOW_PX)
    width = max(flow_width, MAP_PX + 340)
    height = picture.flow_height + MAP_PX + 320
    figure = Figure(figsize=(width / _INCH_PX, height / _INCH_PX), dpi=_INCH_PX)
    flow = figure.add_axes(
        (0.01, 1 - (picture.flow_height + 80) / height, flow_width / width * 0.98, picture.flow_height / height)
    )
    _draw_flow(flow, picture, flow_width)
    side = MAP_PX / width, MAP_PX / height
    _draw_map(figure.add_axes((170 / width, 170 / height, *side)), picture, read)
    figure.text(0.01, 1 - 24 / height, picture.title, fontsize=10, va="top")
    _draw_legend(figure, picture, 1 - 44 / height)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


def _draw_legend(figure: Any, picture: Picture, y: float) -> None:
    from matplotlib.patches import Patch

    handles = [
        Patch(color=EDGE_COLOURS[edge_type], label=f"{edge_type.name.lower().replace('_', ' ')} {count:,}")
        for edge_type, count in picture.edge_types
    ]
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0, y), ncols=len(handles), frameon=False, fontsize=8
    )


def _draw_flow(axes: Axes, picture: Picture, flow_width: float) -> None:
    from matplotlib.patches import FancyBboxPatch, PathPatch
    from matplotlib.path import Path

    move, curve, line = Path.MOVETO, Path.CURVE4, Path.LINETO
    for ribbon in picture.ribbons:
        source, target = picture.bands[ribbon.source], picture.bands[ribbon.target]
        x0, x1 = source.x + _BAND_WIDTH, target.x
        bend = max(30.0, abs(x1 - x0) / 2)
        source_end, target_end = source.y + source.height, target.y + target.height
        points = [(x0, source.y), (x0 + bend, source.y), (x1 - bend, target.y), (x1, target.y)]
        points += [(x1, target_end), (x1 - bend, target_end), (x0 + bend, source_end), (x0, source_end)]
        codes = [move, curve, curve, curve, line, curve, curve, curve]
        axes.add_patch(PathPatch(Path(points, codes), color=EDGE_COLOURS[ribbon.edge_type], alpha=0.42, linewidth=0))
    for band in picture.bands:
        if band.x > flow_width:
            continue
        fill = "white" if band.layer.is_boundary else "#1d1d1f"
        box = FancyBboxPatch(
            (band.x, band.y), _BAND_WIDTH, band.height, boxstyle="round,pad=0,rounding_size=2", fc=fill, ec="#1d1d1f"
        )
        axes.add_patch(box)
        if len(band.layer.nodes) > 1:
            axes.text(band.x, band.y - 4, band.layer.name.split(".")[-1], fontsize=7, clip_on=True)
    axes.set(xlim=(0, flow_width), ylim=(picture.flow_height, 0))
    axes.set_axis_off()


def _draw_map(axes: Axes, picture: Picture, read: ReadTensor | None) -> None:
    from matplotlib.patches import Rectangle

    wide = [tick for tick in picture.ticks if tick[1] - tick[0] >= 9]
    for begin, _, _ in wide:
        axes.axhline(begin, color="#eeeeee", linewidth=0.6)
        axes.axvline(begin, color="#eeeeee", linewidth=0.6)
    for patch in picture.patches:
        colour = EDGE_COLOURS[patch.edge_type]
        width, height = max(patch.width, 1.2), max(patch.height, 1.2)
        raster = weight_raster(patch.block, read) if read is not None and patch.block is not None else None
        if patch.is_diagonal:
            axes.plot([patch.x, patch.x + width], [patch.y, patch.y + height], color=colour, linewidth=1.2)
        elif raster is None:
            axes.add_patch(Rectangle((patch.x, patch.y), width, height, fc=colour, ec="none", alpha=0.85))
        else:
            extent = (patch.x, patch.x + width, patch.y + height, patch.y)
            axes.imshow(raster, extent=extent, interpolation="nearest", aspect="auto")
            axes.add_patch(Rectangle((patch.x, patch.y), width, height, fc="none", ec=colour, linewidth=1))
    middle = [(begin + end) / 2 for begin, end, _ in wide]
    names = [short_name(name) for _, _, name in wide]
    axes.set_xticks(middle, names, rotation=90, fontsize=7)
    axes.set_yticks(middle, names, fontsize=7)
    axes.tick_params(length=0)
    axes.set(xlim=(0, MAP_PX), ylim=(MAP_PX, 0), aspect="auto")
