"""The parameters that an optimizer trains, under the names that the model gives them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from sidecast.manifest import ParameterSpec


@dataclass(frozen=True)
class TrainableParameters:
    """Trained parameters in ``named_parameters()`` order, each once.

    Attributes:
        tensors: The model's own parameters, possibly low-precision or partitioned.
        specs: Their first names and full shapes.
        aliases: Further names of tied parameters, ``{alias: fqn}``.
    """

    tensors: tuple[nn.Parameter, ...]
    specs: tuple[ParameterSpec, ...]
    aliases: Mapping[str, str]

    @cached_property
    def index_of(self) -> dict[int, int]:
        """Position of each parameter by its ``id``."""
        return {id(tensor): index for index, tensor in enumerate(self.tensors)}


def trainable_parameters(module: nn.Module, optimized: Collection[nn.Parameter]) -> TrainableParameters:
    """Names the parameters that an optimizer trains.

    Frozen and zero-element parameters are left out, as the optimizer has no master weights for them.

    Args:
        module: The model, as the engine holds it.
        optimized: The parameters that the optimizer updates.
    """
    optimized_ids = {id(tensor) for tensor in optimized}
    first_names: dict[int, str] = {}
    tensors: list[nn.Parameter] = []
    specs: list[ParameterSpec] = []
    aliases: dict[str, str] = {}
    for fqn, tensor in module.named_parameters(remove_duplicate=False):
        # A parameter that stage 3 has partitioned is empty; its full shape is kept beside it.
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        if id(tensor) not in optimized_ids or not tensor.requires_grad or 0 in shape:
            continue
        if id(tensor) in first_names:
            aliases[fqn] = first_names[id(tensor)]
            continue
        first_names[id(tensor)] = fqn
        tensors.append(tensor)
        specs.append(ParameterSpec(fqn, shape))
    return TrainableParameters(tuple(tensors), tuple(specs), aliases)
