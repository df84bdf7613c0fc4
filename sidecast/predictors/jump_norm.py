"""How large a jump is.

Shape suffix: P elements of the parameter vector.
"""

from __future__ import annotations

import math

from torch import Tensor

# A block in float64 fits a core's cache, and is nothing beside the vectors of small models, too.
_BLOCK_ELEMENTS = 1 << 18


def jump_norm(delta_P: Tensor, base_P: Tensor) -> float:
    """The relative norm ||delta|| / ||base||; infinite or NaN if it is not finite, or the base is zero."""
    base_norm = _norm(base_P)
    return _norm(delta_P) / base_norm if base_norm > 0 else math.inf


def _norm(vector_P: Tensor) -> float:
    # In float64 block by block: one fp32 sum over billions of squares would lose its low digits.
    return math.sqrt(sum(float(block.double().square().sum()) for block in vector_P.split(_BLOCK_ELEMENTS)))
