"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# Published weights and golden cases are not ours to commit; this is where our own machines keep them.
NINO_DATA = Path(os.environ.get("SIDECAST_NINO_DATA", REPOSITORY.parent / "shared" / "data" / "nino"))

if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton kernels run in its interpreter. Triton reads this when it is first imported, by whomever.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def nino_data() -> Path:
    """The folder of published NiNo weights and golden cases; skips without it, but fails under CI."""
    if not NINO_DATA.is_dir():
        reason = f"no published weights and golden cases at {NINO_DATA} (set SIDECAST_NINO_DATA)"
        if os.environ.get("CI"):
            pytest.fail(f"CI must not skip: {reason}")
        pytest.skip(reason)
    return NINO_DATA


@pytest.fixture(scope="session")
def find_tool() -> Callable[[str], str]:
    """Finds an installed program; skips without it, but fails under CI."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is not None:
            return path
        reason = f"{name} is not installed"
        if os.environ.get("CI"):
            pytest.fail(f"CI must not skip: {reason}")
        pytest.skip(reason)

    return find
