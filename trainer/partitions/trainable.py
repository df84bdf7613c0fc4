"""The parameters that an optimizer trains, under the names that the model gives them."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import nn

from sidecast.errors import ConfigError
from sidecast.manifest import ParameterSpec, unwrapped_name

log = logging.getLogger(__name__)


# What batch normalisation and its kin call them.
_RUNNING_MEAN = "running_mean"


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


class TrainedNames:
    """Which parameters a run trains: those that asked for gradients when it was mapped first.

    Scripts freeze and unfreeze in mid-run, and the service knows the ranges of before: what is nowcasted stays.
    """

    def __init__(self) -> None:
        self._names: frozenset[str] | None = None
        self._is_warned = False

    def select(self, module: nn.Module, optimized: Collection[nn.Parameter]) -> TrainableParameters:
        """As ``trainable_parameters``, and from the second time on whatever asks for gradients now."""
        trainable = trainable_parameters(module, optimized, self._names)
        if self._names is None:
            self._names = frozenset(spec.fqn for spec in trainable.specs)
            _note_running_statistics(module)
            _note_what_others_train(module, optimized)
        return trainable

    def note_others(self, trainable: TrainableParameters, optimized: Iterable[nn.Parameter]) -> None:
        """Says once that the optimizer has begun to train what is not nowcasted."""
        if self._is_warned or all(id(item) in trainable.index_of or not item.requires_grad for item in optimized):
            return
        self._is_warned = True
        log.warning(
            "the optimizer trains parameters that were frozen, or not there, when nowcasting began: no jump moves them"
        )


def trainable_parameters(
    module: nn.Module, optimized: Collection[nn.Parameter], names: Collection[str] | None = None
) -> TrainableParameters:
    """Names the parameters that an optimizer trains.

    Frozen and zero-element parameters are left out, as the optimizer has no master weights for them. Names are those of
    the model without wrappers such as ``torch.compile``'s.

    Args:
        module: The model, as the engine holds it.
        optimized: The parameters that the optimizer updates.
        names: Of those to take, frozen or not; None: all that are not frozen.

    Raises:
        ConfigError: The optimizer updates a parameter that the model does not have.
    """
    optimized_ids = {id(tensor) for tensor in optimized}
    first_names: dict[int, str] = {}
    tensors: list[nn.Parameter] = []
    specs: list[ParameterSpec] = []
    aliases: dict[str, str] = {}
    named = [(unwrapped_name(fqn), tensor) for fqn, tensor in module.named_parameters(remove_duplicate=False)]
    known_ids = {id(tensor) for _, tensor in named}
    for tensor in optimized:
        if id(tensor) not in known_ids and tensor.requires_grad:
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
            raise ConfigError(
                f"the optimizer trains a parameter of shape {shape} that the model does not have; "
                "pass the model whose parameters the optimizer was made from"
            )
    for fqn, tensor in named:
        # A parameter that stage 3 has partitioned is empty; its full shape is kept beside it.
        shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
        if id(tensor) in first_names:
            aliases[fqn] = first_names[id(tensor)]
            continue
        is_taken = tensor.requires_grad if names is None else fqn in names
        if id(tensor) not in optimized_ids or not is_taken or 0 in shape:
            continue
        first_names[id(tensor)] = fqn
        tensors.append(tensor)
        specs.append(ParameterSpec(fqn, shape))
    return TrainableParameters(tuple(tensors), tuple(specs), aliases)


def _note_running_statistics(module: nn.Module) -> None:
    """Says which buffers follow a jump, or a rollback, only as training goes on."""
    kept = [unwrapped_name(fqn) for fqn, _ in module.named_buffers() if fqn.endswith(_RUNNING_MEAN)]
    if kept:
        log.warning(
            "%d layers keep running statistics (%s, ...): neither a jump nor a rollback changes them, they follow with "
            "the next batches; torch.optim.swa_utils.update_bn computes them anew",
            len(kept),
            kept[0],
        )


def _note_what_others_train(module: nn.Module, optimized: Iterable[nn.Parameter]) -> None:
    """Says which parameters a jump would leave where they are while it moves the others."""
    own_ids = {id(parameter) for parameter in optimized}
    left = [
        unwrapped_name(fqn)
        for fqn, parameter in module.named_parameters()
        if parameter.requires_grad and parameter.numel() and id(parameter) not in own_ids
    ]
    if left:
        log.warning(
            "%d parameters that ask for gradients are not in the optimizer (%s, ...): where another optimizer trains "
            "them, a jump moves one part of the model and not the other",
            len(left),
            left[0],
        )


def held_by(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What an optimizer updates, or would if it had gradients."""
    held = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [parameter for parameter in held if parameter.numel() > 0]


def tensors_now(
    module: nn.Module, trainable: TrainableParameters, optimizer: torch.optim.Optimizer
) -> list[nn.Parameter]:
    """What the optimizer holds now under the names of ``trainable``, in its order; fewer if some are gone."""
    held_ids = {id(parameter) for parameter in held_by(optimizer)}
    named = {unwrapped_name(fqn): tensor for fqn, tensor in module.named_parameters()}
    found = (named.get(spec.fqn) for spec in trainable.specs)
    return [tensor for tensor in found if tensor is not None and id(tensor) in held_ids]
