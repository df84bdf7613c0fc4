"""What can happen to messages on their way: alterations of serialised chunks, events and of predictions in files."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
from faults import INTERVAL_STEPS

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import ChunkFrame, decode_chunk, encode_chunk

Messages = AsyncIterator[bytes]
Fire = Callable[[], None]


async def duplicate(messages: Messages, fire: Fire) -> Messages:
    """Every message twice."""
    fire()
    async for message in messages:
        yield message
        yield message


async def reorder(messages: Messages, fire: Fire) -> Messages:
    """The first message after the second."""
    first = await anext(messages)
    fire()
    async for message in messages:
        yield message
        if first:
            yield first
            first = b""
    if first:
        yield first


async def end_early(messages: Messages, fire: Fire) -> Messages:
    """All messages but the last; the stream ends as if it were whole."""
    held = await anext(messages)
    async for message in messages:
        yield held
        held = message
    fire()


async def lose_one(messages: Messages, fire: Fire) -> Messages:
    """All messages but the second."""
    fire()
    yield await anext(messages)
    await anext(messages, b"")
    async for message in messages:
        yield message


async def go_on_too_long(messages: Messages, fire: Fire) -> Messages:
    """One message more, with bytes that belong nowhere."""
    last = b""
    async for message in messages:
        yield message
        last = message
    frame = decode_chunk(last)
    fire()
    yield encode_chunk(replace(frame, offset_bytes=frame.offset_bytes + len(frame.data)))


def _one_message(alter: Callable[[bytes], bytes]) -> Callable[[Messages, Fire], Messages]:
    async def altered(messages: Messages, fire: Fire) -> Messages:
        first = await anext(messages)
        # Before it is passed on: the receiver may ask for nothing after it.
        fire()
        yield alter(first)
        async for message in messages:
            yield message

    return altered


def _flip_a_bit(message: bytes) -> bytes:
    return message[:-9] + bytes([message[-9] ^ 0x10]) + message[-8:]


def _cut(message: bytes) -> bytes:
    return message[:-7]


def _with_data(frame: ChunkFrame, data: bytes) -> bytes:
    return encode_chunk(replace(frame, crc32=crc32(data), data=memoryview(data)))


def _forge(message: bytes) -> bytes:
    """Other data under a checksum that fits it."""
    frame = decode_chunk(message)
    return _with_data(frame, bytes(reversed(bytes(frame.data))))


def _spoil(message: bytes) -> bytes:
    """No numbers, under a checksum that fits them."""
    frame = decode_chunk(message)
    return _with_data(frame, np.full(len(frame.data) // 4, np.nan, np.float32).tobytes())


def _of_another_version(message: bytes) -> bytes:
    frame = decode_chunk(message)
    key = pb.ChunkKey()
    key.CopyFrom(frame.key)
    key.id += 1
    return encode_chunk(replace(frame, key=key))


async def _forge_base(messages: Messages, fire: Fire) -> Messages:
    """Says of every message that it is a change since an earlier snapshot than it is."""
    fire()
    async for message in messages:
        frame = decode_chunk(message)
        key = pb.ChunkKey()
        key.CopyFrom(frame.key)
        key.base_step -= INTERVAL_STEPS
        yield encode_chunk(replace(frame, key=key))


CHUNK_ALTERATIONS: dict[str, Callable[[Messages, Fire], Messages]] = {
    "duplicate": duplicate,
    "reorder": reorder,
    "truncate the stream": end_early,
    "lose a chunk": lose_one,
    "too many chunks": go_on_too_long,
    "corrupt": _one_message(_flip_a_bit),
    "truncate a chunk": _one_message(_cut),
    "forge": _one_message(_forge),
    "send NaN": _one_message(_spoil),
    "another version": _one_message(_of_another_version),
    "forge the base": _forge_base,
}


def _announce_another_version(event: pb.SessionEvent) -> None:
    event.published.version += 1


def _announce_another_digest(event: pb.SessionEvent) -> None:
    event.published.digest ^= 1


EVENT_ALTERATIONS: dict[str, Callable[[pb.SessionEvent], None]] = {
    "announce another version": _announce_another_version,
    "announce another digest": _announce_another_digest,
}


def _predict_nan(delta_path: Path) -> None:
    np.memmap(delta_path, np.float32, "r+")[7] = math.nan


def _predict_far(delta_path: Path) -> None:
    np.memmap(delta_path, np.float32, "r+")[:] = 1e6


def _fail(delta_path: Path) -> None:
    raise RuntimeError("The size of tensor a (3) must match the size of tensor b (5) at non-singleton dimension 0")


PREDICTION_ALTERATIONS: dict[str, Callable[[Path], None]] = {
    "predict NaN": _predict_nan,
    "predict too large a jump": _predict_far,
    "predict another shape": _fail,
}
