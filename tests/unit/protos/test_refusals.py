"""One table of refusals: the .proto, the service's errors and the courier's errors say the same."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from sidecast.nowcaster_service import errors
from sidecast.nowcaster_service.errors import ServiceError
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.refusals import REFUSAL_KEY, RefusalKind, Remedy, refusal_kind
from sidecast.trainer.courier.refusals import (
    ERRORS,
    CorruptError,
    OutdatedError,
    RefusedError,
    ReopenError,
    ResendError,
    UnavailableError,
    translated,
)

PROTO = Path(__file__).resolve().parents[3] / "protos" / "nowcast.proto"
ENTRY = re.compile(r"  // (?P<status>[A-Z_]+), (?P<remedy>[a-z ]+): (?P<meaning>.+)\n  (?P<name>[A-Z_]+) = \d+;")


class Failure(grpc.RpcError):
    """A failed call, as grpc gives it."""

    def __init__(self, code: grpc.StatusCode, name: str | None) -> None:
        self._code, self._name = code, name

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "no"

    def trailing_metadata(self) -> tuple[tuple[str, str], ...] | None:
        return None if self._name is None else (("other", "NOT_JOINED"), (REFUSAL_KEY, self._name))


def service_errors() -> Iterator[type[ServiceError]]:
    for item in vars(errors).values():
        if isinstance(item, type) and issubclass(item, ServiceError) and item is not ServiceError:
            yield item


def test_the_proto_lists_the_table_word_for_word() -> None:
    listed = [tuple(match.groups()) for match in ENTRY.finditer(PROTO.read_text())]
    assert listed == [(kind.status, kind.remedy.value, kind.meaning, kind.name) for kind in RefusalKind]
    assert pb.RefusalKind.keys() == ["REFUSAL_KIND_UNSPECIFIED", *(kind.name for kind in RefusalKind)]


def test_every_status_is_one_of_grpcs() -> None:
    for kind in RefusalKind:
        assert grpc.StatusCode[kind.status] is not grpc.StatusCode.OK


def test_the_service_has_one_error_for_each_kind() -> None:
    kinds = sorted(item.kind.name for item in service_errors())
    # What is no SidecastError: a fault of the service's.
    assert sorted([*kinds, RefusalKind.FAILED.name]) == sorted(kind.name for kind in RefusalKind)


def test_the_courier_has_one_error_for_each_remedy() -> None:
    assert set(ERRORS) == set(Remedy)
    assert len(set(ERRORS.values())) == len(Remedy)


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        (RefusalKind.MALFORMED, RefusedError),
        (RefusalKind.UNAUTHENTICATED, RefusedError),
        (RefusalKind.INCOMPATIBLE, RefusedError),
        (RefusalKind.UNKNOWN_SESSION, ReopenError),
        (RefusalKind.OUTDATED, OutdatedError),
        (RefusalKind.NOT_JOINED, ReopenError),
        (RefusalKind.MISSING_REFERENCE, ResendError),
        (RefusalKind.CORRUPT, CorruptError),
        (RefusalKind.SATURATED, UnavailableError),
        (RefusalKind.FAILED, UnavailableError),
        (RefusalKind.FORBIDDEN, RefusedError),
    ],
)
def test_the_courier_does_what_the_table_says(kind: RefusalKind, error: type[Exception]) -> None:
    found = translated(Failure(grpc.StatusCode[kind.status], kind.name))
    assert type(found) is error
    assert str(found) == f"no ({kind.status})"


@pytest.mark.parametrize("name", [None, "", "A_KIND_OF_LATER", "SATURATED"])
def test_a_service_that_names_no_kind_known_here_is_understood_by_its_status(name: str | None) -> None:
    # Codes and answers as they were before kinds had names.
    for code, error in (
        ("INVALID_ARGUMENT", RefusedError),
        ("UNAUTHENTICATED", RefusedError),
        ("UNIMPLEMENTED", RefusedError),
        ("NOT_FOUND", ReopenError),
        ("FAILED_PRECONDITION", OutdatedError),
        ("DATA_LOSS", CorruptError),
        ("ABORTED", ResendError),
        ("RESOURCE_EXHAUSTED", UnavailableError),
        ("INTERNAL", UnavailableError),
        ("UNAVAILABLE", UnavailableError),
        ("DEADLINE_EXCEEDED", UnavailableError),
        ("CANCELLED", UnavailableError),
    ):
        assert type(translated(Failure(grpc.StatusCode[code], name))) is error, code


def test_a_broken_connection_is_no_refusal() -> None:
    assert refusal_kind("UNAVAILABLE", None) is None
    assert refusal_kind("UNAVAILABLE", "MALFORMED") is None
