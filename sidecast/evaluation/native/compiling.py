"""Compiles C++ for this machine's processor, once, into a folder of the caller's."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
_COMPILERS = ("g++", "clang++", "c++")


def compiled(source: Path, folder: Path) -> ctypes.CDLL | None:
    """The library that a source file makes, with the headers that it includes.

    Args:
        source: A C++ file; what it includes in quotes lies beside it.
        folder: Where libraries are kept; its files are of use on this kind of processor only.

    Returns:
        None where there is no compiler, or none that can do it.

    Raises:
        FileNotFoundError: The source or a header is not there.
    """
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return None
    text = "\0".join([*_parts(source).values(), compiler, *_FLAGS, platform.machine(), _processor()])
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


def _parts(source: Path) -> dict[Path, str]:
    """The text of a source file and of every header that it includes in quotes, itself or through another."""
    parts: dict[Path, str] = {}
    left = [source]
    while left:
        path = left.pop()
        if path not in parts:
            parts[path] = path.read_text()
            left += [path.with_name(name) for name in re.findall(r'^#include "(.+)"', parts[path], re.MULTILINE)]
    return parts


def _processor() -> str:
    """What tells processors apart; a folder may be shared by machines."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    return "".join(line for line in path.read_text().splitlines()[:40] if line.startswith(("model name", "flags")))
