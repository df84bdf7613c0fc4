"""Encrypted calls: certificates of both sides, and a service's that is replaced while it runs."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sidecast.commands.__main__ import main
from sidecast.nowcaster_service.config import TlsFiles
from sidecast.trainer.courier.client import NowcastClient
from sidecast.trainer.courier.refusals import UnavailableError
from sidecast.trainer.pipe.messages import ClientSettings
from tests.support.limits import HANG_S
from tests.support.services.harness import RunningService

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
