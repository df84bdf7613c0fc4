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
# The wire types of protobuf, the lower three bits of a tag.
_VARINT, _FIXED64, _LENGTH_DELIMITED, _GROUP_BEGIN, _GROUP_END, _FIXED32_TYPE = range(6)
_MAX_TAG_BYTES = 5
# Far less than the protobuf runtime takes, and far more than anybody sends.
_MAX_GROUP_DEPTH = 16
_FIXED32 = struct.Struct("<I")
_DIGEST_ROW = struct.Struct("<QQI")
DIGEST_BLOCK_BYTES = 1 << 24


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
        # Ten bytes hold 70 bits; the tenth may have but one.
        if position >= len(message) or shift > 63 or (shift == 63 and message[position] > 1):
            raise CodecError(f"chunk message of {len(message)} bytes has a broken varint at byte {position}")
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7


def _skip_field(message: memoryview, tag: int, position: int, depth: int = 0) -> int:
    """Where the next field begins after one that this version does not know, whatever its wire type."""
    number, wire_type = tag >> 3, tag & 7
    if number == 0:
        raise CodecError(f"chunk message has a field tag {tag:#x} that names no field")
    if wire_type == _VARINT:
        position = _read_varint(message, position)[1]
    elif wire_type == _FIXED64:
        position += 8
    elif wire_type == _FIXED32_TYPE:
        position += 4
    elif wire_type == _LENGTH_DELIMITED:
        length, position = _read_varint(message, position)
        position += length
    elif wire_type == _GROUP_BEGIN and depth < _MAX_GROUP_DEPTH:
        end = number << 3 | _GROUP_END
        inner, position = _read_tag(message, position)
        while inner != end:
            position = _skip_field(message, inner, position, depth + 1)
            inner, position = _read_tag(message, position)
    else:
        raise CodecError(f"chunk message has a field tag {tag:#x} that begins no field")
    if position > len(message):
        raise CodecError(f"chunk message of {len(message)} bytes ends inside field {number}")
    return position


def _read_tag(message: memoryview, position: int) -> tuple[int, int]:
    tag, end = _read_varint(message, position)
    if end - position > _MAX_TAG_BYTES or tag >= 1 << 32:
        raise CodecError(f"chunk message of {len(message)} bytes has a broken field tag at byte {position}")
    return tag, end


def records(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The strings and messages within a message, read no further than their lengths.

    Args:
        message: The bytes of any message.

    Yields:
        ``(field number, content)``, in their order; fields of other wire types are skipped.

    Raises:
        CodecError: The bytes are no message, or end too early.
    """
    position = 0
    while position < len(message):
        tag, after_tag = _read_tag(message, position)
        position = _skip_field(message, tag, after_tag)
        if tag & 7 == _LENGTH_DELIMITED:
            yield tag >> 3, message[_read_varint(message, after_tag)[1] : position]


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
    """Parses a ``Chunk`` message without copying its data; fields that a later version added are skipped.

    Raises:
        CodecError: The bytes are not such a message, or end too early.
    """
    view = memoryview(message)
    key, offset_bytes, checksum, data = ChunkKey(), 0, 0, view[:0]
    shared_bytes = shared_buffer = position = 0
    while position < len(view):
        tag, position = _read_tag(view, position)
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
            position = _skip_field(view, tag, position)
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


def vector_digest(vector: memoryview) -> int:
    """63 bits that name this very vector; they fit a vote's int64 payload."""
    rows = []
    for start in range(0, len(vector), DIGEST_BLOCK_BYTES):
        block = vector[start : start + DIGEST_BLOCK_BYTES]
        rows.append((start, len(block), crc32(block)))
    return int.from_bytes(buffer_digest(rows)[:8], "little") >> 1
