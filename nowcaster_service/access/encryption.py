"""TLS of the ports that are not gRPC's: its context, made of the same files."""

from __future__ import annotations

import ssl

from sidecast.errors import ConfigError
from sidecast.nowcaster_service.access.watched_file import WatchedFile
from sidecast.nowcaster_service.config import TlsFiles


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """What handshakes are made with; clients show a certificate where gRPC's have to.

    Raises:
        ConfigError: A file cannot be read, or the certificate is not of the key.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(files.certificate, files.private_key)
        if files.client_authority is not None:
            context.load_verify_locations(files.client_authority)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:
        # Also what OpenSSL finds wrong with what is in them.
        named = ", ".join(f"{path}" for path in (files.certificate, files.private_key, files.client_authority) if path)
        raise ConfigError(f"{named} cannot be used for TLS: {error.strerror or error}") from error
    return context


def watched_context(files: TlsFiles) -> WatchedFile[ssl.SSLContext]:
    """A context that is made anew when one of its files has changed.

    Raises:
        ConfigError: A file cannot be used to begin with.
    """
    others = [path for path in (files.private_key, files.client_authority) if path is not None]
    return WatchedFile(files.certificate, lambda _: server_context(files), others)
