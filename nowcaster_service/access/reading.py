"""Reads messages within limits: what is too large, too much of a kind or no message becomes a refusal, not an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError, Message

from sidecast.nowcaster_service.errors import MalformedError
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import CodecError, decode_chunk, records

KIB, MIB = 1 << 10, 1 << 20
# Any message; gRPC itself refuses what is longer before it has it in memory.
MAX_MESSAGE_BYTES = 32 * MIB
MAX_CHUNK_MESSAGE_BYTES = 4 * MIB
MAX_SMALL_BYTES = 64 * KIB
MAX_PARAMETERS = MAX_SHARDS = 1 << 18
MAX_PARAMETER_BYTES = 4 * KIB
MAX_CONFIG_BYTES = 4 * MIB
# A smaller message cannot hold enough of anything to matter.
COUNTED_FROM_BYTES = 64 * KIB


def reader_of(kind: type[Message]) -> Callable[[bytes], Any]:
    """A deserialiser that never raises: one that does ends the call without a word of ours, and with a traceback.

    Args:
        kind: The message's class.

    Returns:
        A function from the message's bytes to the message, of a ``Chunk`` to a ``ChunkFrame``; or to the MalformedError
        that the call is to be refused with.
    """
    name = kind.DESCRIPTOR.name
    max_bytes, check = {
        "OpenRequest": (MAX_MESSAGE_BYTES, _check_open),
        "JoinRequest": (MAX_MESSAGE_BYTES, _check_join),
        "Chunk": (MAX_CHUNK_MESSAGE_BYTES, None),
    }.get(name, (MAX_SMALL_BYTES, None))

    def read(message: bytes) -> Any:
        try:
            if len(message) > max_bytes:
                raise MalformedError(f"a message of {len(message)} bytes was sent as {name}; allowed: {max_bytes}")
            if check is not None and len(message) > COUNTED_FROM_BYTES:
                # The runtime makes an object of two bytes: what is empty a million times is not even parsed.
                check(memoryview(message))
            return decode_chunk(message) if name == "Chunk" else kind.FromString(message)
        except MalformedError as error:
            return error
        except (CodecError, DecodeError):
            return MalformedError(f"the call holds a message that is not a {name}")

    return read


def _check_open(message: memoryview) -> None:
    manifest = pb.OpenRequest.DESCRIPTOR.fields_by_name["manifest"].number
    config = pb.Manifest.DESCRIPTOR.fields_by_name["config_json"].number
    num_items = 0
    for field, content in records(message):
        for inner, item in records(content) if field == manifest else ():
            num_items += 1
            max_bytes = MAX_CONFIG_BYTES if inner == config else MAX_PARAMETER_BYTES
            if len(item) > max_bytes:
                raise MalformedError(f"the manifest has an entry of {len(item)} bytes; allowed: {max_bytes}")
            if num_items > MAX_PARAMETERS:
                raise MalformedError(f"the manifest has more parameters and aliases than are allowed: {MAX_PARAMETERS}")


def _check_join(message: memoryview) -> None:
    for number, _ in enumerate(records(message), 1):
        if number > MAX_SHARDS:
            raise MalformedError(f"a rank names more shards than are allowed: {MAX_SHARDS}")
