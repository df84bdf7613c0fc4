"""The order of a plain chain's layers, from the names that files list by the alphabet."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sidecast.errors import ConfigError
from sidecast.manifest import ParameterSpec

_DIGITS = re.compile(r"[0-9]+")
_VECTORS = ("weight", "bias")


def in_chain_order(parameters: Sequence[ParameterSpec]) -> tuple[ParameterSpec, ...]:
    """Sorts parameters by the numbers in their names, and in each module matrices and weights before biases.

    Args:
        parameters: Of a plain chain such as ``nn.Sequential``, in any order.

    Raises:
        ConfigError: Two modules lie side by side under names that differ in more than their numbers, such as ``conv``
            and ``head``: such names tell no order.
    """
    children: dict[tuple[str, ...], str] = {}
    for spec in parameters:
        *modules, last = spec.fqn.split(".")
        for depth in range(len(modules) + 1):
            parent = tuple(modules[:depth])
            # Parameters of the parent itself lie beside its modules.
            name = modules[depth] if depth < len(modules) else ""
            other = children.setdefault(parent, name)
            if _DIGITS.sub("#", other) != _DIGITS.sub("#", name):
                raise ConfigError(
                    f"the order of {'.'.join((*parent, other or last))!r} and {'.'.join((*parent, name or last))!r} in "
                    f"the chain is not told by their names; number its modules, or use a predictor without a graph"
                )
    return tuple(sorted(parameters, key=_place))


def _place(spec: ParameterSpec) -> tuple[list[tuple[int, str]], bool, int, str]:
    module, _, last = spec.fqn.rpartition(".")
    # Compared as numbers; Python makes no integers of thousands of digits.
    numbers = [(len(digits), digits) for digits in (found.lstrip("0") for found in _DIGITS.findall(module))]
    return numbers, len(spec.shape) < 2, _VECTORS.index(last) if last in _VECTORS else len(_VECTORS), last
