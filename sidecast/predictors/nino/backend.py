"""What NiNo computes with, on one device: kernels, how edges are read for them, and how large parts may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sidecast.errors import ConfigError
from sidecast.predictors.device import check_device, open_device
from sidecast.predictors.nino.block_parts import PartLimits
from sidecast.predictors.nino.compiled import AUTO, CPU_DTYPES, check_loops, cpu_kernels
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.features import FeatureReader, ScaledReader
from sidecast.predictors.nino.kernels import Kernels
from sidecast.predictors.state_reader import StateReader

PRECISIONS = {"cpu": (*CPU_DTYPES, AUTO), "cuda": ("fp32", "tf32", "bf16")}

GPU_LIMITS = PartLimits(max_scalars=1 << 24, max_sources=4_096, max_nodes=65_536)
"""A part keeps a GPU busy for milliseconds, beside which starting its operators does not count; its features take
320 MiB in fp32."""


@dataclass(frozen=True, kw_only=True)
class NinoBackend:
    """The means of one device.

    Attributes:
        reader: Brings states to the device.
        features: Reads the edges of parts there.
        kernels: Does the tiles.
        limits: How large parts may be; None for those that suit a CPU.
        max_threads: Parts that may be worked on at the same time; None for as many as there are threads.
    """

    reader: StateReader
    features: FeatureReader
    kernels: Kernels
    limits: PartLimits | None = None
    max_threads: int | None = None


def check_precision(device: str, precision: str, loops: str = AUTO) -> None:
    """Raises ConfigError unless predictors know the device, and the precision and the loops there."""
    check_device("device", device)
    allowed = PRECISIONS[device.partition(":")[0]]
    if precision not in allowed:
        raise ConfigError(f"precision is {precision!r}; allowed on {device}: {', '.join(allowed)}")
    if device == "cpu":
        check_loops(precision, loops)
    elif loops != AUTO:
        raise ConfigError(f"loops is {loops!r}; allowed on {device}: {AUTO}")


def open_backend(device: str, precision: str, loops: str, config: NinoConfig) -> NinoBackend:
    """The means of a device for a network.

    Raises:
        ConfigError: This process cannot use it, or its processor lacks what the loops need.
    """
    opened = open_device(device)
    if opened.type == "cuda":
        return triton_backend(opened, precision, config.context_len)
    return cpu_backend(cpu_kernels(precision, loops, config.hidden_dim), config.context_len)


def cpu_backend(kernels: Kernels, context_len: int) -> NinoBackend:
    """Threads on the CPU."""
    reader = StateReader(torch.device("cpu"))
    return NinoBackend(reader=reader, features=ScaledReader(context_len, reader), kernels=kernels)


def triton_backend(device: torch.device, precision: str, context_len: int) -> NinoBackend:
    """Triton kernels on a GPU (or on the CPU, in Triton's interpreter).

    Raises:
        ConfigError: Triton is not installed.
    """
    try:
        from sidecast.predictors.nino.triton_features import TritonFeatures
        from sidecast.predictors.nino.triton_kernels import TritonKernels
    except ImportError as error:
        raise ConfigError(f"device is {str(device)!r}, which needs Triton: {error}") from error
    reader = StateReader(device)
    return NinoBackend(
        reader=reader,
        features=TritonFeatures(context_len, reader),
        kernels=TritonKernels(precision, context_len),
        limits=GPU_LIMITS,
        max_threads=1,
    )
