"""Makes machines slower than they are: delays training steps or uploads of all processes that tests start.

Set ``SIDECAST_TEST_STEP_DELAY_MS`` or ``SIDECAST_TEST_UPLOAD_DELAY_MS`` and run the suite; nothing may change but the
time that it takes.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

# Setting: the method that each call of is delayed.
DELAYED = {
    "SIDECAST_TEST_STEP_DELAY_MS": ("sidecast.trainer.hook.boundary", "NowcastHook", "after_step"),
    "SIDECAST_TEST_UPLOAD_DELAY_MS": ("sidecast.trainer.courier.client", "NowcastClient", "upload"),
}


def prepare(folder: Path, environment: Mapping[str, str]) -> str:
    """Lets every Python that is started with this folder on its path import this module first.

    Args:
        folder: Of our own.
        environment: Where the settings are looked up; couriers do not inherit them.

    Returns:
        The folder, to be the first one of PYTHONPATH; empty if nothing is to be delayed.
    """
    delays_s = {name: float(environment[name]) / 1000 for name in DELAYED if environment.get(name)}
    if not delays_s:
        return ""
    lines = ["import sys", f"sys.path.append({str(Path(__file__).parent)!r})", "import delays"]
    (folder / "sitecustomize.py").write_text("\n".join([*lines, f"delays.install({delays_s!r})", ""]))
    return str(folder)


def install(delays_s: Mapping[str, float]) -> None:
    """Delays what the settings name, once its module is imported."""
    sys.meta_path.insert(0, _Finder({DELAYED[name][0]: (*DELAYED[name][1:], delays_s[name]) for name in delays_s}))


class _Finder(importlib.abc.MetaPathFinder):
    """Finds modules as everybody does, and changes some when they have been loaded."""

    def __init__(self, delayed: dict[str, tuple[str, str, float]]) -> None:
        self._delayed = delayed

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._delayed:
            return None
        kind, method, delay_s = self._delayed.pop(fullname)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_delay(module: ModuleType) -> None:
            load(module)
            _delay(getattr(module, kind), method, delay_s)

        spec.loader.exec_module = load_and_delay  # type: ignore[method-assign]
        return spec


def _delay(kind: type, method: str, delay_s: float) -> None:
    call = getattr(kind, method)

    def delayed(*args: Any, **settings: Any) -> Any:
        threading.Event().wait(delay_s)
        return call(*args, **settings)

    setattr(kind, method, delayed)


def folder_first(folder: str) -> str:
    """A PYTHONPATH that begins with a folder."""
    return os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH", "")]))
