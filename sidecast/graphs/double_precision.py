"""Runs a copy of a network in double precision with parameters of one's choice."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sidecast.errors import ConfigError, NoRoomError
from sidecast.manifest import ParameterSpec

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]

_LOWER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
_LOWERING_METHODS = (Tensor.float, Tensor.half, Tensor.bfloat16)
# The copy, a parameter vector before and after, and what a run of the network keeps.
_COPIES = 6


class DoublePrecisionCopy:
    """A network's copy on the CPU in float64 and evaluation mode, with an input; the network itself stays as it is.

    Running statistics of norms are reset: training computes them anew from channels in whatever order.
    """

    def __init__(self, module: nn.Module, example_inputs: ExampleInputs, parameters: Sequence[ParameterSpec]) -> None:
        """Copies a network.

        Args:
            module: On any device. On ``meta`` it may have no buffers but norms' statistics.
            example_inputs: What it is called with: a tensor, a sequence of arguments, or a mapping of named ones.
            parameters: The parameters, each once, in the order of parameter vectors.

        Raises:
            ConfigError: The module cannot be copied, or the inputs are no inputs.
            NoRoomError: The copy would not fit into memory.
        """
        self._name = type(module).__name__
        num_bytes = 8 * _COPIES * sum(parameter.numel() for parameter in module.parameters())
        free_bytes = _free_bytes()
        if free_bytes is not None and num_bytes > free_bytes:
            raise NoRoomError(
                f"the graph of {self._name} is checked by running a copy in double precision, which takes "
                f"{num_bytes / 2**30:.1f} GiB of memory; {free_bytes / 2**30:.1f} GiB are free"
            )
        self._parameters = tuple(parameters)
        self._arguments, self._named_arguments = _in_double_precision(example_inputs)
        memo: dict[int, Any] = {
            id(parameter): nn.Parameter(torch.zeros(parameter.shape, dtype=_double(parameter.dtype)))
            for parameter in module.parameters()
        }
        memo |= {id(buffer): _buffer(buffer) for buffer in _buffers(module)}
        try:
            self._module = copy.deepcopy(module, memo).eval()
        except Exception as error:  # deepcopy runs the module's own code
            raise ConfigError(f"{self._name} cannot be copied, so its graph cannot be checked: {error}") from error
        for part in self._module.modules():
            if isinstance(part, _NormBase):
                part.reset_running_stats()
        self._by_name = dict(self._module.named_parameters(remove_duplicate=False))

    def outputs(self, vector_P: NDArray[np.float64]) -> list[Tensor]:
        """Every floating-point tensor in what the network returns with these parameters.

        Raises:
            ConfigError: The network fails, or returns none.
        """
        with torch.no_grad():
            self._load(vector_P)
            return self._call()

    def without_effect(self, vector_P: NDArray[np.float64]) -> tuple[str, ...]:
        """Names of the parameters on which the outputs do not depend, to first order at these values."""
        with torch.no_grad():
            self._load(vector_P)
        generator = torch.Generator().manual_seed(1)
        with torch.enable_grad():
            total = sum(
                (output * torch.randn(output.shape, generator=generator, dtype=torch.float64)).sum()
                for output in self._call()
                if output.requires_grad
            )
        wanted = [self._by_name[spec.fqn] for spec in self._parameters]
        if not isinstance(total, Tensor):
            return tuple(spec.fqn for spec in self._parameters)
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        return tuple(
            spec.fqn
            for spec, gradient in zip(self._parameters, gradients, strict=True)
            if gradient is None or not gradient.any()
        )

    def _load(self, vector_P: NDArray[np.float64]) -> None:
        position = 0
        for spec in self._parameters:
            values = torch.from_numpy(vector_P[position : position + spec.numel])
            self._by_name[spec.fqn].copy_(values.reshape(spec.shape))
            position += spec.numel

    def _call(self) -> list[Tensor]:
        default = torch.get_default_dtype()
        try:
            with torch.random.fork_rng(devices=[]), _DoublePrecision():
                torch.manual_seed(0)
                torch.set_default_dtype(torch.float64)
                returned = self._module(*self._arguments, **self._named_arguments)
        except Exception as error:  # whatever a model's forward raises
            first = next(iter(str(error).splitlines()), "")
            raise ConfigError(
                f"{self._name} cannot be run with these example inputs: {type(error).__name__}: {first}"
            ) from error
        finally:
            torch.set_default_dtype(default)
        outputs = [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        if not outputs:
            raise ConfigError(f"{self._name} returns no floating-point tensor, so its graph cannot be checked")
        return [output.double() for output in outputs]


class _DoublePrecision(TorchFunctionMode):
    """Keeps what a network casts to lower precisions in double precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOWERING_METHODS:
            return args[0].double()
        named = {key: _raised(value) for key, value in (kwargs or {}).items()}
        return func(*(_raised(value) for value in args), **named)


def _raised(value: Any) -> Any:
    return _double(value) if isinstance(value, torch.dtype) else value


def _double(dtype: torch.dtype) -> torch.dtype:
    return _LOWER.get(dtype, dtype)


def _in_double_precision(example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    tensors = [leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)]
    if any(tensor.device.type == "meta" for tensor in tensors):
        raise ConfigError("an example input is on the meta device and has no values; give one on the CPU")
    if tensors and not any(tensor.is_floating_point() for tensor in tensors) and all(map(_is_constant, tensors)):
        raise ConfigError(
            f"example_inputs has only one number in a tensor of shape {tuple(tensors[0].shape)}, which hides what its "
            "places do; give different numbers, as torch.randint does"
        )

    def convert(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().cpu()
        if not value.is_floating_point():
            return value
        # Zeros and ones stand for any input and would hide much of what a network does with its input.
        if value.numel() > 1 and _is_constant(value):
            return torch.randn(value.shape, generator=generator, dtype=torch.float64)
        return value.double()

    if isinstance(example_inputs, Tensor):
        return (convert(example_inputs),), {}
    if isinstance(example_inputs, Mapping):
        return (), {str(name): tree_map(convert, value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(tree_map(convert, value) for value in example_inputs), {}
    raise ConfigError(
        f"example_inputs is a {type(example_inputs).__name__}; allowed: a tensor, a sequence of arguments, "
        "a mapping of named ones"
    )


def _is_constant(tensor: Tensor) -> bool:
    return bool((tensor == tensor.reshape(-1)[:1]).all())


def _buffers(module: nn.Module) -> list[Tensor]:
    buffers = []
    for name, buffer in module.named_buffers():
        owner = module.get_submodule(name.rpartition(".")[0])
        if buffer.device.type == "meta" and not isinstance(owner, _NormBase):
            raise ConfigError(
                f"buffer {name!r} is on the meta device and has no values, so the graph cannot be checked; "
                "make the module on the CPU"
            )
        buffers.append(buffer)
    return buffers


def _buffer(buffer: Tensor) -> Tensor:
    if buffer.device.type == "meta":
        return torch.zeros(buffer.shape, dtype=_double(buffer.dtype))
    return buffer.detach().cpu().to(_double(buffer.dtype), copy=True)


def _free_bytes() -> int | None:
    """Memory that is free or can be freed; None where the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
