"""Parameter vectors in raw files, mapped by whoever works on them: nothing is read before it is needed."""

from __future__ import annotations

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


def map_vector(path: Path, manifest: ModelManifest, dtype: torch.dtype, *, writable: bool = False) -> Tensor:
    """Maps a file of one raw parameter vector; privately, so that the file cannot be altered, unless ``writable``.

    Raises:
        ConfigError: The file's size is not that of the model's vector.
    """
    expected_bytes = manifest.num_elements * dtype.itemsize
    if path.stat().st_size != expected_bytes:
        raise ConfigError(
            f"{path} has {path.stat().st_size} bytes; {manifest.num_elements} {dtype} need {expected_bytes}"
        )
    return torch.from_file(str(path), shared=writable, size=manifest.num_elements, dtype=dtype)
