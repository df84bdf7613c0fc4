"""Parameter vectors in raw files, mapped by whoever works on them: nothing is read before it is needed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History


@dataclass(frozen=True, kw_only=True)
class HistoryFiles:
    """A history in files that every engine on this node can map.

    Attributes:
        manifest: The model.
        paths: Files of one raw parameter vector of P elements each, newest last.
        dtype: The type of their elements.
    """

    manifest: ModelManifest
    paths: tuple[Path, ...]
    dtype: torch.dtype = torch.float32

    def open(self) -> History:
        """Maps the files; nothing is read yet."""
        return History(self.manifest, [map_vector(path, self.manifest, self.dtype) for path in self.paths])


@contextmanager
def written_alone(*paths: Path) -> Iterator[None]:
    """Keeps files to whoever writes to them, as long as this process lives; and from a service that takes them over.

    A later service moves a dead one's files away before it looks at them, and looks only while it has their locks: who
    comes after that finds nothing where the files were, and who came before is waited for.

    Raises:
        ConfigError: A file is gone, or somebody else has it.
    """
    with ExitStack() as opened:
        for path in paths:
            try:
                descriptor = os.open(path, os.O_RDWR)
            except FileNotFoundError:
                raise gone(path) from None
            opened.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{path} is being written to by somebody else") from None
            # It may have been moved between the two.
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))):
                raise gone(path)
        yield


def gone(path: Path) -> ConfigError:
    """The refusal of a file that is not where it was."""
    return ConfigError(f"{path} is gone: the service that wrote it has ended")


def map_vector(path: Path, manifest: ModelManifest, dtype: torch.dtype, *, writable: bool = False) -> Tensor:
    """Maps a file of one raw parameter vector; privately, so that the file cannot be altered, unless ``writable``.

    Raises:
        ConfigError: The file is gone, as when the service that named it has died since, or its size is not that of the
            model's vector.
    """
    expected_bytes = manifest.num_elements * dtype.itemsize
    try:
        found_bytes = path.stat().st_size
    except FileNotFoundError:
        raise gone(path) from None
    if found_bytes != expected_bytes:
        raise ConfigError(f"{path} has {found_bytes} bytes; {manifest.num_elements} {dtype} need {expected_bytes}")
    return torch.from_file(str(path), shared=writable, size=manifest.num_elements, dtype=dtype)
