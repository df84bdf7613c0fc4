"""The view of a service as JSON has it."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict

from sidecast.protos import nowcast_pb2 as pb


def as_fields(reply: pb.StatusReply) -> dict[str, Any]:
    """The view in the names of ``StatusReply``; protobuf makes strings of 64-bit numbers."""
    return MessageToDict(reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
