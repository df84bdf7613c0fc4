"""A trainer and a service of different versions: they talk, or say in one sentence why not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from sidecast.nowcaster_service.servicer import Servicer
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos import version
from sidecast.protos.transport import RUN_SECRET_KEY
from sidecast.trainer.courier.client import NowcastClient, open_request
from sidecast.trainer.courier.refusals import RefusedError
from sidecast.trainer.pipe.messages import ClientSettings
from tests.support.courier_harness import SECRET
from tests.support.limits import HANG_S
from tests.support.services import harness as service_harness
from tests.support.services.calls import refusal, refusal_name
from tests.support.services.harness import MANIFEST, RunningService

SHOWN = ((RUN_SECRET_KEY, SECRET),)


@pytest.fixture
def client(service: RunningService) -> Iterator[NowcastClient]:
    with contextlib.closing(client_of(service)) as opened:
        yield opened


def client_of(service: RunningService) -> NowcastClient:
    waits = {"connect_s": HANG_S, "chunk_s": HANG_S, "stream_s": HANG_S}
    client = NowcastClient(ClientSettings(endpoint=service.endpoint, token_file=None, tls_ca=None, **waits))
    client.act_for(SECRET)
    return client


def announcement() -> pb.OpenRequest:
    """What this version's courier sends."""
    fields = {
        "session_id": "s1",
        "run_id": "run",
        "world_size": 2,
        "schema_hash": MANIFEST.schema_hash,
        "context_len": 2,
        "snapshot_interval_steps": 10,
        "period_steps": 20,
        "predictor": "fake",
        "horizon": {},
        "aliases": dict(MANIFEST.aliases),
    }
    parameters = [(spec.fqn, spec.shape) for spec in MANIFEST.parameters]
    return open_request(fields, parameters, '{"model_type": "toy"}')


def open_at(folder: Path, spoken: int) -> int:
    """Has this version's courier open a session at a service that answers with another version.

    Returns:
        The chunk size that the courier learned.
    """

    async def answer(servicer: Servicer, request: pb.OpenRequest, secret: str) -> pb.OpenReply:
        return pb.OpenReply(chunk_bytes=12345, protocol_version=spoken)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Servicer, "open", answer)
        with RunningService(folder) as service, contextlib.closing(client_of(service)) as client:
            client.open(announcement())
            return client.chunk_bytes


def test_both_sides_of_this_version_speak_it(service: RunningService, client: NowcastClient) -> None:
    request = announcement()
    assert request.protocol_version == version.PROTOCOL_VERSION
    client.open(request)
    assert service.stub.Open(request, metadata=SHOWN).protocol_version == version.PROTOCOL_VERSION


def test_a_trainer_from_before_the_number_is_served(service: RunningService) -> None:
    assert service.stub.Open(service_harness.open_request()).protocol_version == 0


def test_a_newer_trainer_is_refused_by_the_service(service: RunningService, client: NowcastClient) -> None:
    newer = announcement()
    newer.protocol_version = version.PROTOCOL_VERSION + 1
    sentence = (
        f"the trainer speaks version {version.PROTOCOL_VERSION + 1} of the protocol; this side speaks 0 to "
        f"{version.PROTOCOL_VERSION}: install the same sidecast for both"
    )
    assert refusal(service.stub.Open, newer) == (grpc.StatusCode.UNIMPLEMENTED, sentence)
    assert refusal_name(service.stub.Open, newer) == "INCOMPATIBLE"
    with pytest.raises(RefusedError, match="the trainer speaks version"):
        client.open(newer)


def test_a_trainer_that_the_service_no_longer_speaks_with_is_refused(
    service: RunningService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(version, "OLDEST_VERSION", 1)
    assert refusal_name(service.stub.Open, service_harness.open_request()) == "INCOMPATIBLE"
    service.stub.Open(announcement(), metadata=SHOWN)
    # Also one whose session is open already.
    assert refusal_name(service.stub.Open, service_harness.open_request()) == "INCOMPATIBLE"


@pytest.mark.parametrize("spoken", [0, 9])
def test_a_service_that_the_trainer_does_not_speak_with_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoken: int
) -> None:
    monkeypatch.setattr(version, "OLDEST_VERSION", 1)
    with pytest.raises(RefusedError, match=f"^the service speaks version {spoken} of the protocol; this side speaks 1"):
        open_at(tmp_path, spoken)


def test_a_service_from_before_the_number_is_used(tmp_path: Path) -> None:
    assert open_at(tmp_path, 0) == 12345
