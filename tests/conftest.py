"""Fixtures that every kind of test shares."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import delays

REPOSITORY = Path(__file__).resolve().parents[1]
# Published weights and golden cases are not ours to commit; this is where our own machines keep them.
NINO_DATA = Path(os.environ.get("SIDECAST_NINO_DATA", REPOSITORY.parent / "shared" / "data" / "nino"))

# DeepSpeed compiles an operator with the first ninja on the path. The system's, if it has one, is another version than
# the one installed here, and each of them takes what the other has built for out of date: a minute of compiling.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache" / "torch_extensions"))

# Programs that tests start import what the tests share, as the tests do.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))

# Files run side by side, and threads that wait for one another on a busy core cost three times what they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if not Path("/dev/nvidiactl").exists():
    # Without a GPU, Triton kernels run in its interpreter. Triton reads this when it is first imported, by whomever.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def delayed_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Applies the settings of ``delays`` to all processes that tests start."""
    folder = delays.prepare(tmp_path_factory.mktemp("delays"), os.environ)
    with pytest.MonkeyPatch.context() as patch:
        if folder:
            patch.setenv("PYTHONPATH", delays.folder_first(folder))
        yield


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
