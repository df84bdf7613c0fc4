"""Ports that others may still have."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from sidecast.errors import ConfigError
from sidecast.nowcaster_service.errors import AddressError

log = logging.getLogger(__name__)
T = TypeVar("T")

FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.1, 2.0


async def until_free(listen: Callable[[], T], deadline_s: float) -> T:
    """Tries to listen at a port until it is free, and what that needs of files is there.

    Raises:
        AddressError: It was not by the deadline, on the monotonic clock.
        ConfigError: A file was not.
    """
    backoff_s = FIRST_BACKOFF_S
    while True:
        try:
            return listen()
        except (AddressError, ConfigError) as error:
            if time.monotonic() >= deadline_s:
                raise
            log.warning("%s; trying again", error)
        await asyncio.sleep(backoff_s)
        backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
