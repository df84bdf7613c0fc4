"""What tells the layers of a traced network apart where its parameters do not: what is computed from them.

A product of a unit with bias and one without cannot have its factors exchanged, because the bias has a node of its own.
Without biases the graph would allow it, and be wrong wherever one factor is activated and the other is not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

Operation = dict[str, Any]

_SHAPE_KEYS = ("num_inputs", "num_outputs", "kernel_size", "num_groups", "num_layers")


def roles_of(operations: list[Operation], is_trained: Callable[[str], bool]) -> dict[str, list[str]]:
    """Which roles the nodes of each value have: a boundary node for each holds them apart from nodes without it.

    Args:
        operations: As ``manifest_of_module`` reads them.
        is_trained: Whether a parameter of that name is in the manifest.

    Returns:
        ``{value: roles}`` of the values whose nodes the graph would otherwise exchange with others that have been
        made, or are used, in another way. Empty for networks whose layers have biases or norm weights.
    """
    return _Roles(operations, is_trained).roles


class _Roles:
    def __init__(self, operations: list[Operation], is_trained: Callable[[str], bool]) -> None:
        self._is_trained = is_trained
        # The value that made a value's nodes, and what has been done to them since.
        self._maker: dict[str, str] = {}
        self._history: dict[str, str] = {}
        # Values whose nodes have a boundary node as neighbour that no other value's nodes have.
        self._told_apart: set[str] = set()
        self.roles: dict[str, list[str]] = {}
        for operation in operations:
            self._follow(operation)
        for operation in operations:
            if operation["kind"] == "add" and self._told_apart.intersection(self._makers(operation)):
                self._told_apart.add(operation["value"])
        for operation in operations:
            if operation["kind"] == "add":
                self._tell_terms_apart(operation)
        self._tell_makers_apart([operation for operation in operations if operation["kind"] != "input"])

    def _follow(self, operation: Operation) -> None:
        kind, value = operation["kind"], operation["value"]
        if kind in ("pass", "norm") and operation["inputs"]:
            before = operation["inputs"][0]
            self._maker[value] = self._maker.get(before, before)
            self._history[value] = f"{self._history.get(before, '')}.{operation.get('function', '')}"
            if kind == "norm" and self._has_vector(operation, "weight"):
                self._told_apart.add(self._maker[value])
        else:
            self._maker[value] = value
            self._history[value] = operation.get("function", "") if kind == "add" else ""
            if kind in ("input", "embedding", "recurrent"):
                self._told_apart.add(value)
        if kind != "output" and self._has_vector(operation, "bias"):
            self._told_apart.add(self._maker[value])

    def _has_vector(self, operation: Operation, part: str) -> bool:
        return bool(operation.get(f"has_{part}")) and self._is_trained(f"{operation.get('module')}.{part}")

    def _makers(self, operation: Operation) -> list[str]:
        return [self._maker.get(value, value) for value in operation["inputs"]]

    def _used(self, operation: Operation) -> list[str]:
        """How each input is used: what is done to it first, and in which place it stands if places differ."""
        has_places = not operation.get("function", "()").endswith("()")
        return [
            self._history.get(value, "") + (f"@{place}" if has_places else "")
            for place, value in enumerate(operation["inputs"])
        ]

    def _tell_terms_apart(self, operation: Operation) -> None:
        terms = {
            (maker, used)
            for maker, used in zip(self._makers(operation), self._used(operation), strict=True)
            if maker not in self._told_apart
        }
        if len({maker for maker, _ in terms}) > 1 and len({used for _, used in terms}) > 1:
            for maker, used in sorted(terms):
                self._give(maker, f"used{used}")

    def _tell_makers_apart(self, operations: list[Operation]) -> None:
        alike: dict[Any, list[tuple[str, str]]] = defaultdict(list)
        for operation in operations:
            value = operation["value"]
            if operation["kind"] not in ("linear", "convolution", "add") or value in self._told_apart:
                continue
            sources = [maker for maker in self._makers(operation) if maker in self._told_apart]
            shape = tuple(str(operation.get(key)) for key in _SHAPE_KEYS)
            made = f"{operation.get('function', '')}{sorted(self._used(operation))}"
            alike[operation["kind"], shape, tuple(sources)].append((value, made))
        for group in alike.values():
            if len({made for _, made in group}) > 1:
                for value, made in group:
                    self._give(value, f"made{made}")

    def _give(self, value: str, role: str) -> None:
        roles = self.roles.setdefault(value, [])
        if role not in roles:
            roles.append(role)
