"""Node sums in files: what a nowcast of a large model finds for its nodes need not fit into memory.

Shape suffixes: V nodes, D hidden.
"""

from __future__ import annotations

import mmap
import weakref
from pathlib import Path

import torch
from torch import Tensor

from sidecast.mapped_memory import map_unnamed_file
from sidecast.predictors.base import History, Predictor
from sidecast.predictors.passes import PassPredictor, predict_in_passes
from sidecast.predictors.workspace import MemoryWorkspace

MIN_FILE_BYTES = 1 << 25
"""Smaller sums stay in memory, of which a nowcast needs some such pieces anyway."""


class FileWorkspace:
    """Implements ``Workspace`` with mapped files, which have no name and go when nobody maps them any more.

    Args:
        folder: On the disk to use; a folder that is itself kept in memory saves none.
        min_file_bytes: Smaller tensors are plain memory.
    """

    def __init__(self, folder: Path, min_file_bytes: int = MIN_FILE_BYTES) -> None:
        self._folder = folder
        self._min_file_bytes = min_file_bytes
        self._memory = MemoryWorkspace()
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

    def zeros(self, num_nodes: int, dim: int) -> Tensor:
        """See ``Workspace.zeros``.

        Raises:
            NoRoomError: The disk has no room for it.
        """
        num_bytes = num_nodes * dim * torch.float32.itemsize
        if num_bytes < self._min_file_bytes:
            return self._memory.zeros(num_nodes, dim)
        mapped = map_unnamed_file(self._folder, num_bytes, "node sums")
        self._maps.add(mapped)
        return torch.frombuffer(mapped, dtype=torch.float32).view(num_nodes, dim)

    def trim(self) -> None:
        """See ``Workspace.trim``: what is mapped and in memory stays the system's to keep or to write out."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)


def predict_with_files(
    predictor: Predictor, history: History, horizon_intervals: int, out: Tensor, folder: Path
) -> None:
    """``Predictor.predict``, with files in a folder for what would take too much memory.

    Raises:
        ConfigError: The predictor cannot work on this history, model or horizon.
        NoRoomError: The folder's disk is full.
    """
    if isinstance(predictor, PassPredictor):
        workspace, num_threads = FileWorkspace(folder), torch.get_num_threads()
        predict_in_passes(predictor, history, horizon_intervals, out, num_threads=num_threads, workspace=workspace)
    else:
        predictor.predict(history, horizon_intervals, out)
