"""Watches a run of a network, operation by operation, and learns what its axes carry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sidecast.errors import ConfigError
from sidecast.graphs.axes.calls import Axes, Call, Recording
from sidecast.graphs.axes.dimensions import Dimension, held, hold
from sidecast.graphs.axes.operations import FOLLOWED, KEEPS_ORIGIN, Follow, follow_elementwise
from sidecast.graphs.double_precision import ExampleInputs


def record_run(module: nn.Module, example_inputs: ExampleInputs) -> tuple[Recording, dict[str, list[Dimension]]]:
    """Runs a module once and follows the axes of its tensors.

    Args:
        module: On any device, ``meta`` too; run in evaluation mode and left as it was.
        example_inputs: What it is called with: a tensor, a sequence of arguments, or a mapping of named ones.

    Returns:
        What was learned, and the axes of every parameter, tied ones once.

    Raises:
        ConfigError: The module cannot be run with these inputs.
    """
    recording = Recording()
    parameters = {}
    for name, parameter in module.named_parameters():
        parameters[name] = [Dimension(size) for size in parameter.shape]
        recording.set_axes(parameter, parameters[name])
        recording.set_origin(parameter, name)
    for part in module.modules():
        if isinstance(part, _NormBase):
            # Training computes running statistics anew, from channels in whatever order.
            for buffer in part.buffers(recurse=False):
                recording.set_axes(buffer, [Dimension(size) for size in buffer.shape])
    arguments, named = _called_with(module, example_inputs)
    for leaf in tree_leaves((arguments, named)):
        if isinstance(leaf, Tensor):
            recording.set_axes(leaf, [held(size) for size in leaf.shape])
    try:
        with _left_as_it_was(module), torch.no_grad(), torch.random.fork_rng(devices=[]), _Recorder(recording):
            returned = module.eval()(*arguments, **named)
    except Exception as error:  # whatever a model's forward raises
        first = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"{type(module).__name__} cannot be run with these example inputs: {type(error).__name__}: {first}"
        ) from error
    for leaf in tree_leaves(returned):
        if isinstance(leaf, Tensor):
            for axis in recording.axes(leaf):
                hold(axis)
    return recording, parameters


@contextmanager
def _left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Restores the mode of every part, frozen ones in evaluation among them, and buffers that a run writes to."""
    is_in_training, modes = module.training, [(part, part.training) for part in module.modules()]
    buffers = [
        (part, name, buffer, None if buffer is None or buffer.device.type == "meta" else buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
    ]
    try:
        yield
    finally:
        # By the module's own method first: parts may do more than note their mode.
        module.train(is_in_training)
        for part, is_training in modes:
            part.training = is_training
        for part, name, buffer, before in buffers:
            part._buffers[name] = buffer
            if buffer is not None and before is not None and not torch.equal(buffer, before):
                with torch.no_grad():
                    buffer.copy_(before)


def _called_with(module: nn.Module, example_inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, where the module's parameters are."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))

    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.device.type == "meta" != device.type:
            raise ConfigError("an example input is on the meta device and has no values; give one on the CPU")
        return value.detach().to(device)

    if isinstance(example_inputs, Tensor):
        return (place(example_inputs),), {}
    if isinstance(example_inputs, Mapping):
        return (), {str(name): tree_map(place, value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(tree_map(place, value) for value in example_inputs), {}
    raise ConfigError(
        f"example_inputs is a {type(example_inputs).__name__}; allowed: a tensor, a sequence of arguments, "
        "a mapping of named ones"
    )


class _Recorder(TorchDispatchMode):
    """Gives every tensor that an operation makes its axes."""

    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        call = Call(
            name=_plain_name(func),
            arguments=_named(func, args, kwargs),
            outputs=outputs,
            recording=self._recording,
        )
        self._follow(call, func)
        return result

    def _follow(self, call: Call, func: Any) -> None:
        # Arguments are looked at before outputs: an operation in place gives one of them.
        follow = FOLLOWED.get(call.name)
        if follow is None and torch.Tag.pointwise in func.tags:
            follow = follow_elementwise
        axes = None if follow is None else _followed(follow, call)
        if axes is None:
            if call.tensors:
                self._recording.not_followed[call.name] = None
            axes = call.hold_all()
        for output, output_axes in zip(call.outputs, axes, strict=True):
            self._recording.set_axes(output, output_axes)
        self._keep_origin(call, follow)

    def _keep_origin(self, call: Call, follow: Any) -> None:
        sources = [tensor for tensor in call.tensors if tensor.dim()]
        if call.name not in KEEPS_ORIGIN and (follow is not follow_elementwise or len(sources) != 1):
            return
        origin = self._recording.origin(sources[0]) if sources else None
        if origin is not None:
            for output in call.outputs:
                self._recording.set_origin(output, origin)


def _followed(follow: Follow, call: Call) -> list[Axes] | None:
    """The axes of all outputs; None where the operation does what is not known of it."""
    try:
        axes = follow(call)
    except Exception:  # arguments, and kinds of tensors, that nobody thought of
        return None
    if axes is None or [[axis.size for axis in each] for each in axes] != [list(each.shape) for each in call.outputs]:
        return None
    return axes


def _plain_name(func: Any) -> str:
    name = str(func._schema.name).removeprefix("aten::")
    return name if name.endswith("__") else name.removesuffix("_")


def _named(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    schema = func._schema.arguments
    named = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    named |= {argument.name: value for argument, value in zip(schema, args, strict=False)}
    return {**named, **kwargs}
