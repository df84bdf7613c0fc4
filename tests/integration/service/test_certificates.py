"""Encrypted calls: certificates of both sides, and a service's that is replaced while it runs."""

from __future__ import annotations

import hashlib
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from sidecast.commands.__main__ import main
from sidecast.nowcaster_service.access.callers import callers_of
from sidecast.nowcaster_service.access.scraping import serve_metrics
from sidecast.nowcaster_service.config import TlsFiles
from sidecast.nowcaster_service.metrics import ServiceMetrics
from sidecast.trainer.courier.client import NowcastClient
from sidecast.trainer.courier.refusals import UnavailableError
from sidecast.trainer.pipe.messages import ClientSettings
from tests.support.limits import HANG_S
from tests.support.services.harness import RunningService, service_config

MAKE_CERTS = Path(__file__).resolve().parents[3] / "deploy" / "make_certs.sh"
# Of a handshake that fails: it is tried again and again until then.
REFUSED_S = 2.0


@pytest.fixture
def authority(find_tool: Callable[[str], str], tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    """Makes an authority, with a certificate for this host: folders of the service's and the clients' files."""
    find_tool("openssl")

    def make(name: str) -> tuple[Path, Path]:
        service, client = tmp_path / name / "service", tmp_path / name / "client"
        subprocess.run([MAKE_CERTS, service, client, "localhost"], check=True, capture_output=True)
        return service, client

    return make


def is_reached(service: RunningService, ca: Path, pair: Path | None = None, connect_s: float = HANG_S) -> bool:
    """Whether a courier's client is answered.

    Args:
        service: By whom.
        ca: Of the authority that it trusts.
        pair: Folder of the certificate and the key that it shows; None: it shows none.
        connect_s: How long it tries.
    """
    settings = ClientSettings(
        endpoint=f"localhost:{service.port}",
        token_file=None,
        tls_ca=str(ca),
        tls_cert=None if pair is None else str(pair / "tls.crt"),
        tls_key=None if pair is None else str(pair / "tls.key"),
        connect_s=connect_s,
        chunk_s=2 * HANG_S,
        stream_s=3 * HANG_S,
    )
    client = NowcastClient(settings)
    try:
        client.wait_reachable()
    except UnavailableError:
        return False
    finally:
        client.close()
    return True


def test_a_certificate_is_replaced_while_the_service_runs(
    authority: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    (old, old_client), (new, new_client) = authority("old"), authority("new")
    files = TlsFiles(certificate=old / "tls.crt", private_key=old / "tls.key")
    with RunningService(tmp_path, tls=files) as service:
        assert is_reached(service, old_client / "ca.crt")
        assert not is_reached(service, new_client / "ca.crt", connect_s=REFUSED_S)
        for name in ("tls.crt", "tls.key"):
            (new / name).replace(old / name)
        assert is_reached(service, new_client / "ca.crt")
        assert not is_reached(service, old_client / "ca.crt", connect_s=REFUSED_S)
        # It is being replaced just now.
        (old / "tls.key").unlink()
        assert is_reached(service, new_client / "ca.crt")


def test_metrics_of_tenants_are_encrypted_and_one_silent_connection_holds_up_nobody(
    authority: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    folder, client = authority("own")
    (tmp_path / "tenants").write_text(f"red {hashlib.sha256(b'token').hexdigest()}\n")
    files = TlsFiles(certificate=folder / "tls.crt", private_key=folder / "tls.key")
    config = service_config(tmp_path, tls=files, tenants_file=tmp_path / "tenants")
    metrics = ServiceMetrics(CollectorRegistry())
    port = serve_metrics(config, metrics.registry, callers_of(config), lambda caller: set(), 0)
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}),
        urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=client / "ca.crt")),
    )
    with socket.create_connection(("127.0.0.1", port)):
        request = urllib.request.Request(f"https://localhost:{port}/", headers={"Authorization": "Bearer token"})
        with opener.open(request, timeout=HANG_S) as reply:
            assert b"sidecast_service_sessions 0.0" in reply.read()


def client_certificate(folder: Path) -> Path:
    """Makes one that is its own authority."""
    folder.mkdir()
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=client", "-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_a_service_that_asks_for_certificates_answers_none_but_its_authoritys(
    authority: Callable[[str], tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service_folder, ca = authority("service")
    known, unknown = client_certificate(tmp_path / "known"), client_certificate(tmp_path / "unknown")
    files = TlsFiles(
        certificate=service_folder / "tls.crt",
        private_key=service_folder / "tls.key",
        client_authority=known / "tls.crt",
    )
    with RunningService(tmp_path, tls=files) as service:
        assert is_reached(service, ca / "ca.crt", known)
        assert not is_reached(service, ca / "ca.crt", unknown, connect_s=REFUSED_S)
        assert not is_reached(service, ca / "ca.crt", connect_s=REFUSED_S)
        ask = ["status", f"localhost:{service.port}", "--tls-ca", str(ca / "ca.crt")]
        assert main([*ask, "--tls-cert", str(known / "tls.crt"), "--tls-key", str(known / "tls.key")]) == 0
        assert capsys.readouterr().out.startswith("sidecast test, up ")
        assert main([*ask, "--tls-cert", str(known / "tls.crt")]) == 2
        assert capsys.readouterr().err == (
            "sidecast: --tls-cert and --tls-key go together, and with --tls-ca; one of them is missing\n"
        )
