"""bf16 values as the upper halves of fp32, by integer arithmetic: the same bits on both sides, without torch.

Shape legend: N elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BF16_BYTES = 2
_QUIET_NAN = np.uint16(0x40)
# Elements per tile of what works in place, so that temporaries stay small.
TILE = 1 << 18


def round_to_bf16(values_N: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds to the nearest bf16 value, ties to even.

    Args:
        values_N: fp32.

    Returns:
        N upper halves, uint16.
    """
    bits_N = values_N.view(np.uint32)
    halves_N = ((bits_N + (0x7FFF + ((bits_N >> 16) & 1))) >> 16).astype(np.uint16)
    is_nan_N = np.isnan(values_N)
    if is_nan_N.any():
        # The carry would make infinity of some of them, and a number of others.
        halves_N[is_nan_N] = (bits_N[is_nan_N] >> 16).astype(np.uint16) | _QUIET_NAN
    return halves_N


def from_bf16(halves_N: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The fp32 values of N upper halves."""
    return (halves_N.astype(np.uint32) << 16).view(np.float32)


def round_in_place(values_N: NDArray[np.float32]) -> None:
    """Makes every value one that bf16 holds exactly."""
    for start in range(0, len(values_N), TILE):
        tile = values_N[start : start + TILE]
        tile[:] = from_bf16(round_to_bf16(tile))
