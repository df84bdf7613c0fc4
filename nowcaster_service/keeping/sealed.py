"""Small files that say what other files are: whole or refused, and worth something to whoever has the key.

A line that names the format, a line of JSON, a digest of both, and the digest that only the key makes. A file that was
cut or altered is told from one that somebody else has written.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sidecast.atomic_files import replacing
from sidecast.errors import SidecastError

FORMAT = b"sidecast history, format 1"
DIGEST_BYTES = 16


class RecordError(SidecastError):
    """What is recorded cannot be used; the message says why, and begins with what it is about."""


@dataclass(frozen=True)
class Sealed:
    """What a file says.

    Attributes:
        content: Its JSON object; not to be believed before ``require_key``.
    """

    content: dict[str, Any]
    _text: bytes
    _seal: bytes

    def require_key(self, key: bytes) -> None:
        """Refuses a file that was written with another key.

        Raises:
            RecordError: It was.
        """
        if not hmac.compare_digest(_seal_of(self._text, key), self._seal):
            raise RecordError("the record is sealed with another key than this run's")


def write_sealed(path: Path, content: Mapping[str, Any], key: bytes) -> None:
    """Puts a file in the place of what is there, at once.

    Args:
        path: Of the file; nobody else writes it meanwhile.
        content: What JSON can say.
        key: Of whoever may read it.

    Raises:
        OSError: There is no room for it; what was there before is still there.
    """
    text = json.dumps(content, separators=(",", ":"), allow_nan=False).encode()
    with replacing(path) as partial:
        partial.write_bytes(b"\n".join((FORMAT, text, _digest_of(text), _seal_of(text, key), b"")))


def read_sealed(path: Path) -> Sealed:
    """Reads a file.

    Raises:
        RecordError: It is not there, not whole, altered, or of another format.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(f"the record cannot be read: {error.strerror}") from error
    if lines[0] != FORMAT:
        found = lines[0][:80].decode(errors="replace")
        raise RecordError(f"the record begins with {found!r}; allowed: {FORMAT.decode()!r}")
    if len(lines) != 5 or lines[4] != b"" or lines[2] != _digest_of(lines[1]):
        raise RecordError("the record is torn or altered")
    content = json.loads(lines[1])
    if not isinstance(content, dict):
        raise RecordError("the record is no JSON object")
    return Sealed(content, lines[1], lines[3])


def _digest_of(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=DIGEST_BYTES).hexdigest().encode()


def _seal_of(text: bytes, key: bytes) -> bytes:
    return hmac.new(key, FORMAT + text, hashlib.sha256).hexdigest().encode()
