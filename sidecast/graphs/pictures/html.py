"""A picture of a topology as one self-contained HTML page."""

from __future__ import annotations

import base64
import struct
import zlib
from html import escape

import numpy as np
from numpy.typing import NDArray

from sidecast.graphs.pictures.picture import EDGE_COLOURS, MAP_PX, Band, Patch, Picture, Ribbon, arrange, short_name
from sidecast.graphs.pictures.weight_colours import ReadTensor, weight_raster
from sidecast.graphs.topology import Topology

_BAND_WIDTH = 12.0
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:28px;color:#1d1d1f;background:#fff}
h1{font-size:19px;margin:0 0 4px}h2{font-size:15px;margin:26px 0 6px}p{margin:2px 0 10px;color:#555;max-width:880px}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;margin:14px 0}
.legend span{display:inline-flex;align-items:center;gap:6px}
.legend i{width:16px;height:12px;border-radius:2px;display:inline-block}.legend small{color:#777}
.scroll{overflow-x:auto;border:1px solid #ddd;border-radius:6px;padding:6px}
svg text{font:9px system-ui,sans-serif;fill:#444}.grid{stroke:#eee}rect:hover,path:hover,line:hover{opacity:1}
"""


def picture_html(topology: Topology, read: ReadTensor | None = None) -> str:
    """Draws a topology.

    Args:
        topology: Any size.
        read: Where weights come from, to colour the map by; None draws edge types alone.

    Returns:
        The page.
    """
    picture = arrange(topology)
    weights = (
        "<p>Blocks are filled with a sample of their weights: blue is negative, red is positive.</p>"
        if read is not None
        else ""
    )
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(picture.title)}</title>"
        f"<style>{_STYLE}</style><h1>Neural graph</h1><p>{escape(picture.title)}</p>{_legend(picture)}"
        "<h2>Flow</h2><p>Every bar is a layer of nodes, its height the logarithm of their number. Keys are drawn with "
        "the computation, though their edges run against it.</p>"
        f"<div class=scroll>{_flow(picture)}</div>"
        "<h2>Adjacency map</h2><p>Sources from top to bottom, targets from left to right, both in node order and on a "
        f"logarithmic scale inside which every layer is linear. Hover for names.</p>{weights}"
        f"{_map(picture, read)}</html>\n"
    )


def _legend(picture: Picture) -> str:
    entries = "".join(
        f'<span><i style="background:{EDGE_COLOURS[edge_type]}"></i>{_type_name(edge_type.name)}'
        f"<small>{count:,}</small></span>"
        for edge_type, count in picture.edge_types
    )
    return f"<div class=legend>{entries}</div>"


def _type_name(name: str) -> str:
    return name.lower().replace("_", " ")


def _flow(picture: Picture) -> str:
    ribbons = "".join(_ribbon(ribbon, picture.bands) for ribbon in picture.ribbons)
    bands = "".join(_band(band) for band in picture.bands)
    size = f'width="{picture.flow_width:.0f}" height="{picture.flow_height:.0f}"'
    return f"<svg {size} xmlns='http://www.w3.org/2000/svg'>{ribbons}{bands}</svg>"


def _ribbon(ribbon: Ribbon, bands: tuple[Band, ...]) -> str:
    source, target = bands[ribbon.source], bands[ribbon.target]
    x0, x1 = source.x + _BAND_WIDTH, target.x
    bend = max(30.0, abs(x1 - x0) / 2)
    left, right = x0 + bend, x1 - bend
    source_end, target_end = source.y + source.height, target.y + target.height
    path = (
        f"M{x0:.1f} {source.y:.1f}C{left:.1f} {source.y:.1f} {right:.1f} {target.y:.1f} {x1:.1f} {target.y:.1f}"
        f"V{target_end:.1f}"
        f"C{right:.1f} {target_end:.1f} {left:.1f} {source_end:.1f} {x0:.1f} {source_end:.1f}Z"
    )
    return (
        f'<path d="{path}" fill="{EDGE_COLOURS[ribbon.edge_type]}" opacity=".42">'
        f"<title>{escape(ribbon.label)}</title></path>"
    )


def _band(band: Band) -> str:
    fill = "#fff" if band.layer.is_boundary else "#1d1d1f"
    label = band.layer.name.split(".")[-1] if len(band.layer.nodes) > 1 else ""
    title = f"{escape(band.layer.name)}: {len(band.layer.nodes):,} nodes"
    return (
        f'<rect x="{band.x:.1f}" y="{band.y:.1f}" width="{_BAND_WIDTH}" height="{band.height:.1f}" rx="2" '
        f'fill="{fill}" stroke="#1d1d1f"><title>{title}</title></rect>'
        f'<text x="{band.x:.1f}" y="{band.y - 4:.1f}">{escape(label)}</text>'
    )


def _map(picture: Picture, read: ReadTensor | None) -> str:
    margin = 150.0
    wide = [tick for tick in picture.ticks if tick[1] - tick[0] >= 9]
    grid = "".join(f'<path class=grid d="M{x:.1f} 0V{MAP_PX}M0 {x:.1f}H{MAP_PX}"/>' for x, _, _ in wide)
    labels = "".join(_labels((begin + end) / 2 + 3, escape(short_name(name))) for begin, end, name in wide)
    patches = "".join(_patch(patch, read) for patch in picture.patches)
    size = MAP_PX + 2 * margin
    return (
        f"<svg width='{size}' height='{MAP_PX + margin + 10}' viewBox='{-margin} -5 {size} {MAP_PX + margin + 10}' "
        f"xmlns='http://www.w3.org/2000/svg'>{grid}{patches}{labels}"
        f"<rect width='{MAP_PX}' height='{MAP_PX}' fill='none' stroke='#999'/></svg>"
    )


def _labels(place: float, name: str) -> str:
    below = f"translate({place:.1f} {MAP_PX + 6}) rotate(90)"
    return f'<text x="-6" y="{place:.1f}" text-anchor="end">{name}</text><text transform="{below}">{name}</text>'


def _patch(patch: Patch, read: ReadTensor | None) -> str:
    colour = EDGE_COLOURS[patch.edge_type]
    width, height = max(patch.width, 1.2), max(patch.height, 1.2)
    title = f"<title>{escape(patch.label)}</title>"
    if patch.is_diagonal:
        return (
            f'<line x1="{patch.x:.2f}" y1="{patch.y:.2f}" x2="{patch.x + width:.2f}" y2="{patch.y + height:.2f}" '
            f'stroke="{colour}" stroke-width="1.6">{title}</line>'
        )
    place = f'x="{patch.x:.2f}" y="{patch.y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    raster = weight_raster(patch.block, read) if read is not None and patch.block is not None else None
    if raster is None:
        return f'<rect {place} fill="{colour}" opacity=".85">{title}</rect>'
    data = base64.b64encode(_png(raster)).decode()
    return (
        f'<image {place} preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{data}"/>'
        f'<rect {place} fill="transparent" stroke="{colour}" stroke-width="1.2">{title}</rect>'
    )


def _png(raster: NDArray[np.uint8]) -> bytes:
    """Encodes rows of RGB pixels."""
    height, width, _ = raster.shape
    rows = b"".join(b"\0" + row.tobytes() for row in raster)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
