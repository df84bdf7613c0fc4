"""Where a predictor computes."""

from __future__ import annotations

import re

import torch

from sidecast.errors import ConfigError

_DEVICE = re.compile(r"cpu|cuda(:\d+)?")


def check_device(option: str, device: object) -> None:
    """Raises ConfigError unless this names a device that predictors know; it need not be there yet."""
    if not isinstance(device, str) or _DEVICE.fullmatch(device) is None:
        raise ConfigError(f"{option} is {device!r}; allowed: cpu, cuda, cuda:0, cuda:1 and so on")


def open_device(device: str) -> torch.device:
    """A device by its name.

    Raises:
        ConfigError: This process cannot use it.
    """
    opened = torch.device(device)
    if opened.type == "cuda":
        num_devices = torch.cuda.device_count()
        if num_devices == 0:
            raise ConfigError(f"device is {device!r}, but this process sees no CUDA device; allowed here: cpu")
        if opened.index is not None and opened.index >= num_devices:
            raise ConfigError(
                f"device is {device!r}, but this process sees {num_devices} CUDA devices; "
                f"allowed here: cpu, cuda:0 to cuda:{num_devices - 1}"
            )
        # Tensors always tell their index.
        return torch.device("cuda", torch.cuda.current_device() if opened.index is None else opened.index)
    return opened
