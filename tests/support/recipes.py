"""The code that CONTRIBUTING.md shows, to be run as it stands there."""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def listing(beginning: str) -> str:
    """The Python file of a recipe that begins with these words."""
    found = re.search(
        rf"^ *```python\n( *{re.escape(beginning)}.*?)^ *```$", PAGE.read_text(), re.MULTILINE | re.DOTALL
    )
    assert found is not None, f"CONTRIBUTING.md shows no file that begins with {beginning!r}"
    return textwrap.dedent(found[1])


def module_of(beginning: str, name: str) -> ModuleType:
    """That file as a module, which is not in ``sys.modules``."""
    module = ModuleType(name)
    assert name not in sys.modules
    exec(compile(listing(beginning), f"CONTRIBUTING.md ({name})", "exec"), module.__dict__)  # noqa: S102
    return module
