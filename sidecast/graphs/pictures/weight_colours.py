"""The weights of a block as a small raster of colours.

Shape suffixes: S rows (sources), T columns (targets).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sidecast.graphs.topology import Block, BlockKind

ReadTensor = Callable[[str], Tensor | None]
"""Returns a parameter by its name, or None if the snapshot lacks it."""

_LARGEST_RASTER = 40
# Endpoints and middle of a diverging scale: negative, zero, positive.
_NEGATIVE, _ZERO, _POSITIVE = (
    np.array(rgb, dtype=np.float64) for rgb in ((33, 102, 172), (247, 247, 247), (178, 24, 43))
)


def weight_raster(block: Block, read: ReadTensor) -> NDArray[np.uint8] | None:
    """Colours of a sample of the block's weights, uint8 (S, T, 3): blue below zero, red above.

    Args:
        block: A dense block; others have no raster.
        read: Where parameters come from.

    Returns:
        None for structural and diagonal blocks and for parameters that the snapshot lacks. Colours are saturated at
        2.5 times the sample's root mean square.
    """
    view = block.view
    if view is None or block.kind is not BlockKind.DENSE:
        return None
    tensor = read(view.fqn)
    if tensor is None:
        return None
    flat = tensor.reshape(-1)
    sources = _sample(len(block.source))
    targets = _sample(len(block.target))
    element_ST = np.array([[view.element(int(i), int(j)) for j in targets] for i in sources], dtype=np.int64)
    value_ST = flat[element_ST.ravel()].float().numpy().reshape(element_ST.shape)
    saturation = 2.5 * float(np.sqrt(np.mean(np.square(value_ST)))) or 1.0
    strength = np.clip(value_ST / saturation, -1, 1)[..., None]
    colour = np.where(strength < 0, _ZERO + (_NEGATIVE - _ZERO) * -strength, _ZERO + (_POSITIVE - _ZERO) * strength)
    return colour.round().astype(np.uint8)


def _sample(count: int) -> NDArray[np.int64]:
    return np.linspace(0, count - 1, min(count, _LARGEST_RASTER)).round().astype(np.int64)
