"""Who calls: everybody with the shared token, or tenants, each with tokens of its own."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sidecast.errors import ConfigError
from sidecast.nowcaster_service.access.watched_file import WatchedFile
from sidecast.nowcaster_service.config import TENANTS_OPTION, TOKEN_OPTION, ServiceConfig, read_file, read_token

OPERATOR = "operator"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_SCHEME = "Bearer "


@dataclass(frozen=True, kw_only=True)
class Caller:
    """On whose behalf a call is made.

    Attributes:
        tenant: Whose token it carries; empty where there are no tenants.
        is_operator: Whether it may see all tenants' runs, and still act for none but its own.
        secret: Of the run that it is about; empty for none.
    """

    tenant: str = ""
    is_operator: bool = False
    secret: str = ""

    def sees(self, tenant: str) -> bool:
        """Whether it may know of a tenant's runs."""
        return self.is_operator or self.tenant == tenant


ANYBODY = Caller()


class Callers(Protocol):
    """Tells callers by the tokens that they show."""

    def caller(self, authorization: str) -> Caller | None:
        """Who calls, as far as a token tells.

        Args:
            authorization: The call's metadata of that name; empty for none.

        Returns:
            None: The call is to be refused.
        """
        ...


def callers_of(config: ServiceConfig) -> Callers:
    """Whom a service answers.

    Raises:
        ConfigError: The file of tokens cannot be read, or holds what is not allowed.
    """
    if config.tenants_file is not None:
        return _Tenants(config.tenants_file)
    return _Anybody() if config.token_file is None else _TokenHolders(config.token_file)


class _Anybody:
    def caller(self, authorization: str) -> Caller | None:
        return ANYBODY


class _TokenHolders:
    def __init__(self, path: Path) -> None:
        self._token = WatchedFile(path, lambda path: read_token(TOKEN_OPTION, path))

    def caller(self, authorization: str) -> Caller | None:
        # In constant time: the time of a plain comparison tells how much of a guess is right.
        is_right = hmac.compare_digest(authorization.encode(), f"{_SCHEME}{self._token.value}".encode())
        return ANYBODY if is_right else None


class _Tenants:
    def __init__(self, path: Path) -> None:
        self._callers = WatchedFile(path, read_tenants)

    def caller(self, authorization: str) -> Caller | None:
        token = authorization.removeprefix(_SCHEME)
        if token == authorization:
            return None
        # Found by its digest: how long that takes tells nothing about a token.
        return self._callers.value.get(hashlib.sha256(token.encode()).hexdigest())


def read_tenants(path: Path) -> Mapping[str, Caller]:
    """Reads who may call, by the SHA-256 digests of their tokens in hexadecimal digits.

    A line is ``NAME DIGEST`` or ``NAME DIGEST operator``; empty lines and lines that begin with # are left out. A
    tenant with several lines has several tokens, as while one is being replaced. Tokens are random, as of ``openssl
    rand -hex 32``: a digest without salt and rounds does not give them away.

    Args:
        path: Of the file.

    Raises:
        ConfigError: It cannot be read, holds no tenant, or a line is not one of these; the message holds no digest.
    """
    callers: dict[str, Caller] = {}
    text = read_file(TENANTS_OPTION, path).decode(errors="replace")
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or line.lstrip().startswith("#"):
            continue
        name, digest, *rest = [*words, ""] if len(words) == 1 else words
        if not (_NAME.fullmatch(name) and _DIGEST.fullmatch(digest) and rest in ([], [OPERATOR])):
            raise ConfigError(
                f"{TENANTS_OPTION} {path}, line {number}, is no tenant; allowed: a name of up to 128 letters, digits "
                f"and . _ -, the SHA-256 digest of its token in 64 digits of 0-9 a-f, and perhaps {OPERATOR}"
            )
        if digest in callers:
            raise ConfigError(f"{TENANTS_OPTION} {path}, line {number}: another line has the same token")
        callers[digest] = Caller(tenant=name, is_operator=bool(rest))
    if not callers:
        raise ConfigError(f"{TENANTS_OPTION} {path} names no tenant")
    return callers
