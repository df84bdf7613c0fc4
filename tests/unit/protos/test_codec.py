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


@given(st.binary(max_size=60))
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
