"""What the two sides must agree on about a model before a single byte is sent."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

from sidecast.errors import ConfigError

# What torch.compile, FSDP, Lightning and activation checkpointing put between a module and its parent.
_INSIDE = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_forward_module|_checkpoint_wrapped_module)\.")

GRAPH_ATTRIBUTE = "sidecast_graph"
"""Where a module keeps the description of its graph, in the place of a configuration."""

NAMES_KEY = "sidecast_names"
"""Where a configuration keeps what its family calls parameters that have other names, ``{name: the family's}``."""


def unwrapped_name(fqn: str) -> str:
    """A parameter's name without what wrappers inside of the model add to it."""
    return _INSIDE.sub("", fqn)


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One trainable parameter tensor.

    Attributes:
        fqn: Dotted name, as in ``model.named_parameters()``; a tied weight appears once, under its first name.
        shape: Full (unpartitioned) shape.
    """

    fqn: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class ModelManifest:
    """The parameters of a model in one fixed order, and the configuration that explains them.

    All parameters, row-major and concatenated in this order, form *the parameter vector* (P elements):
    snapshots, histories and predictions are such vectors.

    Attributes:
        parameters: Every trainable parameter, once.
        config: The model's configuration as plain JSON values (for Hugging Face models ``config.to_dict()``).
            Its ``model_type`` selects the graph builder.
        aliases: Further names of tied parameters, ``{alias: fqn}``.
    """

    parameters: tuple[ParameterSpec, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.parameters):
            seen: set[str] = set()
            for spec in self.parameters:
                if spec.fqn in seen:
                    raise ConfigError(f"parameter {spec.fqn!r} is listed twice; every parameter appears once")
                seen.add(spec.fqn)

    @classmethod
    def from_shapes(
        cls,
        shapes: Iterable[tuple[str, Iterable[int]]],
        config: Mapping[str, Any] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> ModelManifest:
        """Builds a manifest from ``(fqn, shape)`` pairs, in their order."""
        parameters = tuple(ParameterSpec(fqn, tuple(shape)) for fqn, shape in shapes)
        return cls(parameters, dict(config or {}), dict(aliases or {}))

    @cached_property
    def num_elements(self) -> int:
        """P, the length of the parameter vector."""
        return sum(spec.numel for spec in self.parameters)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each parameter begins in the parameter vector, in elements."""
        offsets, position = {}, 0
        for spec in self.parameters:
            offsets[spec.fqn] = position
            position += spec.numel
        return offsets

    @cached_property
    def rows(self) -> dict[str, int]:
        """Which one each parameter is in this order, from 0."""
        return {spec.fqn: row for row, spec in enumerate(self.parameters)}

    @cached_property
    def by_name(self) -> dict[str, ParameterSpec]:
        return {spec.fqn: spec for spec in self.parameters}

    def spec(self, fqn: str) -> ParameterSpec:
        """The parameter of that name."""
        return self.by_name[fqn]

    @cached_property
    def schema_hash(self) -> str:
        """Hex digest of names, shapes, order and configuration: equal if and only if snapshots are comparable."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: equal manifests give equal text."""
        return json.dumps(
            {
                "parameters": [[spec.fqn, list(spec.shape)] for spec in self.parameters],
                "config": dict(self.config),
                "aliases": dict(self.aliases),
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> ModelManifest:
        data = json.loads(text)
        return cls(
            tuple(ParameterSpec(fqn, tuple(shape)) for fqn, shape in data["parameters"]),
            data["config"],
            data["aliases"],
        )
