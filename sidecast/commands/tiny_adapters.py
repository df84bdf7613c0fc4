"""Low-rank adapters on a tiny model, as PEFT would add them, so that their place in the graph is proved too."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from sidecast.errors import ConfigError, shown

_RANK = 2
_TRAINED_HEADS = ("score", "classifier")
_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


def linear_layers(model: nn.Module) -> list[str]:
    """Names of what PEFT's ``all-linear`` adapts: linear layers, but for those that make the output."""
    heads = {id(getattr(model, "get_output_embeddings", lambda: None)())}
    heads |= {id(part) for name, part in model.named_children() if name in _TRAINED_HEADS}
    return [name for name, part in model.named_modules() if _is_linear(part) and id(part) not in heads]


def add_adapters(model: nn.Module, like: Collection[str]) -> None:
    """Adds factors of rank 2 beside linear layers, under the names that PEFT gives them.

    Args:
        model: Changed in place; its outputs change with the factors.
        like: Names of adapted modules; those of other layers count too.

    Raises:
        ConfigError: None of the model's layers has such a name, or one is not linear.
    """
    wanted = {_NUMBER.sub("*", name) for name in like}
    found = [(name, part) for name, part in model.named_modules() if _NUMBER.sub("*", name) in wanted]
    if not found:
        raise ConfigError(f"the adapters adapt {shown(next(iter(like)))}, which {type(model).__name__} does not have")
    for name, part in found:
        if not _is_linear(part):
            raise ConfigError(
                f"the adapters adapt {shown(name)}, a {type(part).__name__}; a graph of a family has a place for "
                "adapters of linear layers"
            )
        num_outputs, num_inputs = _widths(part)
        part.lora_A = nn.ModuleDict({"default": nn.Linear(num_inputs, _RANK, bias=False)})
        part.lora_B = nn.ModuleDict({"default": nn.Linear(_RANK, num_outputs, bias=False)})
        part.register_forward_hook(_adapted)


def _is_linear(part: nn.Module) -> bool:
    # GPT-2's layers have their weights the other way round; some routers are linear layers that return more.
    kind = type(part).__name__
    return (isinstance(part, nn.Linear) and not kind.endswith("Router")) or kind == "Conv1D"


def _widths(part: nn.Module) -> tuple[int, int]:
    first, second = part.get_parameter("weight").shape
    return (first, second) if isinstance(part, nn.Linear) else (second, first)


def _adapted(part: Any, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + part.lora_B["default"](part.lora_A["default"](arguments[0]))
