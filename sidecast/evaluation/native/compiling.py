"""Compiles a source file for this machine's processor, once, into a folder of the caller's."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILERS = ("g++", "clang++", "c++")


def compiled(source: Path, folder: Path) -> ctypes.CDLL | None:
    """The library that a source file makes.

    Args:
        source: A C++ file.
        folder: Where libraries are kept; its files are of use on this kind of processor only.

    Returns:
        None where there is no compiler, or none that can do it.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None or not source.exists():
        return None
    text = "\0".join([source.read_text(), compiler, *_FLAGS, platform.machine(), _processor()])
    library = folder / f"{source.stem}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Of a name of its own: several processes may do this at once.
        unfinished = library.with_suffix(f".{os.getpid()}.tmp")
        command = [compiler, *_FLAGS, "-o", str(unfinished), str(source)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return None
        unfinished.replace(library)
    return ctypes.CDLL(str(library))


def _processor() -> str:
    """What tells processors apart; a folder may be shared by machines."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    return "".join(line for line in path.read_text().splitlines()[:40] if line.startswith(("model name", "flags")))
