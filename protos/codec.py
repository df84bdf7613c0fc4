"""Chunks on the wire without a copy too many, checksums, and the digest of a rank-local buffer.

``encode_chunk`` and ``decode_chunk`` read and write exactly the bytes of the ``Chunk`` message of nowcast.proto;
they exist because the protobuf runtime copies a ``bytes`` field once more on each side.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from zlib import crc32

from google.protobuf.message import DecodeError

from sidecast.protos.nowcast_pb2 import ChunkKey

# Field numbers and wire types of Chunk: key (1, length-delimited), offset_bytes (2, varint), crc32 (3, fixed32),
# data (4, length-delimited), shared_bytes (5, varint), shared_buffer (6, varint).
_KEY_TAG, _OFFSET_TAG, _CRC_TAG, _DATA_TAG, _SHARED_BYTES_TAG, _SHARED_BUFFER_TAG = 0x0A, 0x10, 0x1D, 0x22, 0x28, 0x30
_FIXED32 = struct.Struct("<I")
_DIGEST_ROW = struct.Struct("<QQI")


class CodecError(ValueError):
    """The bytes are not a Chunk message."""


@dataclass(frozen=True, slots=True)
class ChunkFrame:
    """One decoded chunk; ``data`` is a view of the received message.

    Attributes:
        shared_bytes: Where there is no data: how many bytes lie at this offset of a buffer that both sides have mapped.
        shared_buffer: Which of the rank's buffers that is.
    """

    key: ChunkKey
    offset_bytes: int
    crc32: int
    data: memoryview
    shared_bytes: int = 0
    shared_buffer: int = 0


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _read_varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position >= len(message) or shift > 63:
            raise CodecError(f"chunk message of {len(message)} bytes has a broken varint at byte {position}")
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def encode_chunk(frame: ChunkFrame) -> bytes:
    """Serialises a chunk as a ``Chunk`` message, copying its data once."""
    key = frame.key.SerializeToString()
    header = b"".join(
        (
            bytes((_KEY_TAG,)),
            _varint(len(key)),
            key,
            bytes((_OFFSET_TAG,)),
            _varint(frame.offset_bytes),
            bytes((_CRC_TAG,)),
            _FIXED32.pack(frame.crc32),
            bytes((_SHARED_BYTES_TAG,)),
            _varint(frame.shared_bytes),
            bytes((_SHARED_BUFFER_TAG,)),
            _varint(frame.shared_buffer),
            bytes((_DATA_TAG,)),
            _varint(len(frame.data)),
        )
    )
    return b"".join((header, frame.data))


def decode_chunk(message: bytes) -> ChunkFrame:
    """Parses a ``Chunk`` message without copying its data.

    Raises:
        CodecError: The bytes are not such a message.
    """
    view = memoryview(message)
    key, offset_bytes, checksum, data = ChunkKey(), 0, 0, view[:0]
    shared_bytes = shared_buffer = position = 0
    while position < len(view):
        tag, position = _read_varint(view, position)
        if tag == _OFFSET_TAG:
            offset_bytes, position = _read_varint(view, position)
        elif tag == _SHARED_BYTES_TAG:
            shared_bytes, position = _read_varint(view, position)
        elif tag == _SHARED_BUFFER_TAG:
            shared_buffer, position = _read_varint(view, position)
        elif tag == _CRC_TAG:
            if position + 4 > len(view):
                raise CodecError(f"chunk message of {len(view)} bytes ends inside its checksum")
            checksum = _FIXED32.unpack_from(view, position)[0]
            position += 4
        elif tag in (_KEY_TAG, _DATA_TAG):
            length, position = _read_varint(view, position)
            field = view[position : position + length]
            if len(field) != length:
                raise CodecError(f"chunk message of {len(view)} bytes ends inside a field of {length} bytes")
            if tag == _KEY_TAG:
                try:
                    key = ChunkKey.FromString(bytes(field))
                except DecodeError as error:
                    raise CodecError(f"chunk message of {len(view)} bytes has a broken key: {error}") from error
            else:
                data = field
            position += length
        else:
            raise CodecError(f"chunk message has an unknown field tag {tag:#x}")
    return ChunkFrame(key, offset_bytes, checksum, data, shared_bytes, shared_buffer)


def split_chunks(key: ChunkKey, buffer: memoryview, chunk_bytes: int, offset_bytes: int = 0) -> Iterator[ChunkFrame]:
    """Cuts a rank-local buffer into chunks.

    Args:
        key: What the buffer is.
        buffer: The whole rank-local buffer, as bytes.
        chunk_bytes: Size of all chunks but the last.
        offset_bytes: Where to begin; a multiple of ``chunk_bytes`` when an interrupted transfer goes on.
    """
    for start in range(offset_bytes, len(buffer), chunk_bytes):
        data = buffer[start : start + chunk_bytes]
        yield ChunkFrame(key, start, crc32(data), data)


def buffer_digest(chunks: Iterable[tuple[int, int, int]], base_digest: bytes = b"") -> bytes:
    """The digest of a rank-local buffer.

    Args:
        chunks: ``(offset_bytes, length_bytes, crc32)`` of its chunks; any order, each once.
        base_digest: Digest of the buffer that this one says the changes since; empty for values.

    Returns:
        16 bytes.
    """
    digest = hashlib.blake2b(digest_size=16)
    for row in sorted(chunks):
        digest.update(_DIGEST_ROW.pack(*row))
    digest.update(base_digest)
    return digest.digest()
