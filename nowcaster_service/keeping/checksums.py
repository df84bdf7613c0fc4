"""Checksums of committed states, by what the ranks' chunks said.

A state's checksums are rows of two 32-bit numbers, little-endian: the length in bytes of the next piece of the vector,
and its CRC-32. They cover the vector once, from its beginning to its end.
"""

from __future__ import annotations

from collections.abc import Iterable
from zlib import crc32

import numpy as np

MAX_PIECES = 1 << 17
"""A matrix that is cut by columns makes a piece of each row; so many take a tenth of a second to record."""

Piece = tuple[int, int, int]
"""Where a piece of a vector starts, its length in bytes, and its CRC-32."""


def packed_checksums(pieces: Iterable[Piece], num_bytes: int) -> bytes:
    """The checksums of a vector.

    Args:
        pieces: Of the vector, in any order.
        num_bytes: Size of the vector.

    Returns:
        Rows of 8 bytes; empty if the pieces do not cover the vector exactly once, or are so many that to record them
        would hold up the event loop at every commit.
    """
    pieces = list(pieces)
    if len(pieces) > MAX_PIECES:
        return b""
    rows_R3 = np.array(sorted(pieces), dtype=np.uint64).reshape(-1, 3)
    stops_R = rows_R3[:, 0] + rows_R3[:, 1]
    is_whole = len(rows_R3) > 0 and rows_R3[0, 0] == 0 and stops_R[-1] == num_bytes
    if not (is_whole and np.array_equal(rows_R3[1:, 0], stops_R[:-1])):
        return b""
    return rows_R3[:, 1:].astype("<u4").tobytes()


def first_altered_byte(vector: memoryview, checksums: bytes) -> int | None:
    """Where the first piece begins that is not what it was; None if there is none.

    Args:
        vector: The whole vector; it is read once.
        checksums: Of the vector as it was.
    """
    start = 0
    for length, checksum in np.frombuffer(checksums, "<u4").reshape(-1, 2).tolist():
        if crc32(vector[start : start + length]) != checksum:
            return start
        start += length
    return None if start == len(vector) else start
