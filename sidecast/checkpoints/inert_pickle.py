"""Reads the pickled files of a training run without running, or even importing, anything that they name.

Built on ``torch.load(weights_only=True)``, which builds tensors and plain values only. DeepSpeed also pickles a few
objects of its own; these become inert stand-ins, so that DeepSpeed need not be installed. The index of a distributed
checkpoint is a bare pickle, which torch's restricted unpickler does not read; its objects become inert records.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from sidecast.errors import ConfigError, one_line

# Values that trainers keep next to the weights (arguments, random states): of no use here, harmless as stand-ins.
_STAND_IN_NAMES = frozenset(
    {
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.ndarray",
        "numpy._core.multiarray._reconstruct",
        "numpy.core.multiarray._reconstruct",
        "numpy._core.multiarray.scalar",
        "numpy.core.multiarray.scalar",
    }
)
_STAND_IN_PACKAGE = "deepspeed."
_RECORD_PACKAGE = "torch.distributed."
_RECORD_NAMES = frozenset({"torch.serialization._get_layout", "pathlib.PosixPath", "pathlib._local.PosixPath"})
_PLAIN_NAMES = {"torch.Size": tuple, "collections.OrderedDict": dict}


class StandIn:
    """Takes the place of an object whose class is not to be imported; keeps what it was called with, does nothing.

    Attributes:
        arguments: What the pickled object was made from; for an enum member its value.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        # Without it the unpickler would set attributes that the file chooses.
        del state


def load_inert(path: Path) -> Any:
    """Loads a file that ``torch.save`` wrote, its tensors memory-mapped.

    Raises:
        ConfigError: It is damaged, no such file, or names code outside the short list that gets stand-ins.
    """
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        refused = sorted(name for name in named if not _gets_stand_in(name))
        if refused:
            raise ConfigError(
                f"{path} is refused: its pickle names {refused[0]!r}, which could run code; "
                f"only tensors, plain values and DeepSpeed's own records are read"
            )
        stand_ins: list[Any] = [(StandIn, name) for name in named]
        with torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except ConfigError:
        raise
    except Exception as error:  # bytes that are no pickle can fail anywhere in the unpickler
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from error


class Record:
    """Takes the place of an object whose class is not to be imported, and keeps what it holds.

    Attributes:
        kind: The class's full name.
        state: What its attributes were, mostly a dictionary by their names.
    """

    kind = ""
    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        del arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full_name = f"{module}.{name}"
        if full_name in _PLAIN_NAMES:
            return _PLAIN_NAMES[full_name]
        if full_name in _RECORD_NAMES or full_name.startswith(_RECORD_PACKAGE):
            return type("Record", (Record,), {"kind": full_name})
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        raise ConfigError(f"its pickle names {full_name!r}, which could run code; only tensors' descriptions are read")


def load_records(path: Path) -> Any:
    """Loads a bare pickle of plain values, dtypes and records of ``torch.distributed``.

    Raises:
        ConfigError: It is damaged, or names anything else.
    """
    try:
        with path.open("rb") as file:
            return _RecordUnpickler(file).load()
    except ConfigError as error:
        raise ConfigError(f"{path} is refused: {error}") from error
    except Exception as error:  # bytes that are no pickle can fail anywhere in the unpickler
        raise ConfigError(f"{path} cannot be read: {one_line(error)}") from error


def _gets_stand_in(name: str) -> bool:
    return name.startswith(_STAND_IN_PACKAGE) or name in _STAND_IN_NAMES
