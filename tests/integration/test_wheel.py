"""What is installed is what lies in the tree: every module and every file that a module reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
# The folders at the top, by where they are installed.
FOLDERS = {"sidecast": "", "trainer": "trainer/", "nowcaster_service": "nowcaster_service/", "protos": "protos/"}
# Read by tools and compilers, or made by them.
NOT_INSTALLED = {".toml", ".cpp", ".h", ".so", ".pyc"}
# But for what is compiled where it is used.
COMPILED_WHERE_USED = REPOSITORY / "sidecast/evaluation/native"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """Built from a copy, since a build folder in the tree would bring back modules that are there no more."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for folder in (*FOLDERS, "src"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(REPOSITORY / folder, source / folder, symlinks=True, ignore=ignored)
    built = tmp_path_factory.mktemp("built")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    # Without a compiler the loops of NiNo are left out, which are no module.
    environment = {**os.environ, "CC": "false", "CXX": "false"}
    done = subprocess.run(
        [*command, "--wheel-dir", built, source], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (path,) = built.glob("sidecast-*.whl")
    return ZipFile(path)


def tree() -> set[str]:
    """What is to be installed, by the names that it then has."""
    return {
        f"sidecast/{prefix}{path.relative_to(REPOSITORY / folder)}"
        for folder, prefix in FOLDERS.items()
        for path in (REPOSITORY / folder).rglob("*")
        if path.is_file() and is_installed(path)
    }


def is_installed(path: Path) -> bool:
    if path.parent == COMPILED_WHERE_USED and path.suffix in {".cpp", ".h"}:
        return True
    return path.suffix not in NOT_INSTALLED and "/." not in str(path.relative_to(REPOSITORY))


def test_the_wheel_holds_the_modules_of_the_tree(wheel: ZipFile) -> None:
    expected = {name for name in tree() if name.endswith(".py")}
    assert len(expected) > 200
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


def test_the_wheel_holds_what_modules_read(wheel: ZipFile) -> None:
    expected = {name for name in tree() if not name.endswith(".py")}
    assert "sidecast/trainer/report/templates/report.html" in expected
    assert {"sidecast/evaluation/native/llama_gradient.cpp", "sidecast/evaluation/native/memory.h"} <= expected
    assert {name for name in wheel.namelist() if not name.endswith(".py") and ".dist-info/" not in name} == expected


def test_the_wheel_brings_the_command(wheel: ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "sidecast = sidecast.commands.__main__:main" in wheel.read(entry_points).decode()


def test_the_wheel_carries_the_licence(wheel: ZipFile) -> None:
    (licence,) = [name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE")]
    assert wheel.read(licence) == (REPOSITORY / "LICENSE").read_bytes()
