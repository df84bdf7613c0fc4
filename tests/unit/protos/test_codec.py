"""Our chunk framing against the protobuf runtime's, and against damage."""

from __future__ import annotations

from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecast.protos.codec import ChunkFrame, CodecError, buffer_digest, decode_chunk, encode_chunk, split_chunks
from sidecast.protos.nowcast_pb2 import Chunk, ChunkKey

UINT32 = st.integers(0, 2**32 - 1)
UINT64 = st.integers(0, 2**64 - 1)
KEYS = st.builds(ChunkKey, session_id=st.text(max_size=20), rank=st.integers(0, 2**32 - 1), id=UINT64, epoch=UINT64)


@given(
    key=KEYS,
    offset=UINT64,
    crc=UINT32,
    data=st.binary(max_size=300),
    shared=st.tuples(UINT32, UINT32),
)
def test_speaks_the_runtimes_language_both_ways(
    key: ChunkKey, offset: int, crc: int, data: bytes, shared: tuple[int, int]
) -> None:
    ours = encode_chunk(ChunkFrame(key, offset, crc, memoryview(data), *shared))
    theirs = Chunk(key=key, offset_bytes=offset, crc32=crc, data=data, shared_bytes=shared[0], shared_buffer=shared[1])
    assert Chunk.FromString(ours) == theirs
    frame = decode_chunk(theirs.SerializeToString())
    assert (frame.key, frame.offset_bytes, frame.crc32, bytes(frame.data)) == (key, offset, crc, data)
    assert (frame.shared_bytes, frame.shared_buffer) == shared


def varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def field(number: int, wire_type: int, content: bytes) -> bytes:
    return varint(number << 3 | wire_type) + content


def group(number: int, fields: list[bytes]) -> bytes:
    return field(number, 3, b"".join(fields)) + field(number, 4, b"")


# Those of Chunk end with 6; protobuf allows numbers of 29 bits.
LATER_NUMBERS = st.integers(7, 2**29 - 1)
LATER_FIELDS = st.recursive(
    st.builds(field, LATER_NUMBERS, st.just(0), UINT64.map(varint))
    | st.builds(field, LATER_NUMBERS, st.just(1), st.binary(min_size=8, max_size=8))
    | st.builds(field, LATER_NUMBERS, st.just(2), st.binary(max_size=200).map(lambda data: varint(len(data)) + data))
    | st.builds(field, LATER_NUMBERS, st.just(5), st.binary(min_size=4, max_size=4)),
    lambda fields: st.builds(group, LATER_NUMBERS, st.lists(fields, max_size=3)),
    max_leaves=5,
)


@given(
    key=KEYS, offset=UINT64, data=st.binary(max_size=100), before=st.lists(LATER_FIELDS), after=st.lists(LATER_FIELDS)
)
def test_fields_of_a_later_version_are_skipped(
    key: ChunkKey, offset: int, data: bytes, before: list[bytes], after: list[bytes]
) -> None:
    plain = encode_chunk(ChunkFrame(key, offset, crc32(data), memoryview(data), 5, 1))
    message = b"".join([*before, plain, *after])
    assert Chunk.FromString(message).offset_bytes == offset
    assert decode_chunk(message) == decode_chunk(plain)


@given(later=LATER_FIELDS, data=st.data())
def test_a_later_field_that_ends_too_early_is_refused(later: bytes, data: st.DataObject) -> None:
    decode_chunk(later)
    with pytest.raises(CodecError):
        decode_chunk(later[: data.draw(st.integers(1, len(later) - 1))])


@pytest.mark.parametrize(
    "message",
    [
        field(7, 4, b""),
        field(7, 6, b""),
        field(7, 7, b""),
        field(0, 0, b"\x01"),
        field(7, 3, field(8, 4, b"")),
        field(7, 3, b"") * 1000 + field(7, 4, b"") * 1000,
        field(7, 0, b"\xff" * 9 + b"\x02"),
        b"\x80\x80\x80\x80\x80\x01\x00",
        b"\x90\x80\x80\x80\x80\x00\x00",
    ],
    ids=["group-end", "type-6", "type-7", "number-0", "other-group", "deep", "65-bits", "36-bit-tag", "tag-of-6-bytes"],
)
def test_what_begins_no_field_is_refused(message: bytes) -> None:
    with pytest.raises(CodecError):
        decode_chunk(message)


@given(
    st.binary(max_size=60)
    | st.lists(LATER_FIELDS, max_size=3).flatmap(lambda fields: st.permutations(b"".join(fields))).map(bytes)
)
def test_any_bytes_are_a_chunk_or_a_codec_error(message: bytes) -> None:
    try:
        frame = decode_chunk(message)
    except CodecError:
        return
    assert Chunk.FromString(message).data == bytes(frame.data)


def test_every_truncation_is_noticed() -> None:
    data = b"some weights"
    whole = encode_chunk(ChunkFrame(ChunkKey(session_id="s"), 7, crc32(data), memoryview(data)))
    for length in range(len(whole)):
        try:
            frame = decode_chunk(whole[:length])
        except CodecError:
            continue
        assert not len(frame.data) or crc32(frame.data) != frame.crc32


def test_a_broken_key_is_a_codec_error() -> None:
    with pytest.raises(CodecError, match="broken key"):
        decode_chunk(b"\x0a\x02\xff\xff")


def test_decoding_copies_nothing() -> None:
    message = encode_chunk(ChunkFrame(ChunkKey(), 0, 0, memoryview(b"abc")))
    assert decode_chunk(message).data.obj is message


@given(data=st.binary(max_size=100), chunk_bytes=st.integers(1, 40))
def test_chunks_are_the_buffer_in_order_and_its_digest_knows_every_byte(data: bytes, chunk_bytes: int) -> None:
    frames = list(split_chunks(ChunkKey(), memoryview(data), chunk_bytes))
    assert b"".join(frame.data for frame in frames) == data
    assert all(frame.crc32 == crc32(frame.data) for frame in frames)
    rows = [(frame.offset_bytes, len(frame.data), frame.crc32) for frame in frames]
    digest = buffer_digest(rows)
    assert buffer_digest(reversed(rows)) == digest
    if data:
        changed = bytes([data[0] ^ 1]) + data[1:]
        others = split_chunks(ChunkKey(), memoryview(changed), chunk_bytes)
        assert buffer_digest((frame.offset_bytes, len(frame.data), frame.crc32) for frame in others) != digest
