"""Reads a model's configuration (plain JSON values) with errors that name the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sidecast.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration.

    Attributes:
        values: As in ``ModelManifest.config``.
    """

    values: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        value = self.values.get("model_type")
        if not isinstance(value, str):
            raise ConfigError(
                f"the model's configuration has model_type={value!r}; a graph needs its name, or a description: "
                "sidecast.graphs.remember_graph(model, example_inputs) before training, --module with saved models"
            )
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer; ``default`` if the key is absent or null.

        Raises:
            ConfigError: There is neither a value nor a default, or the value is not a positive integer.
        """
        value = self.values.get(key)
        if value is None:
            if default is None:
                raise ConfigError(f"the model's configuration lacks {key!r}, which its graph needs")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"the model's configuration has {key}={value!r}; it must be a positive integer")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A truth value; ``default`` if the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ConfigError(f"the model's configuration has {key}={value!r}; it must be true or false")
        return value

    def text(self, key: str, default: str) -> str:
        """A string; ``default`` if the key is absent or null."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise ConfigError(f"the model's configuration has {key}={value!r}; it must be a string")
        return value


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Widths of one attention layer.

    Attributes:
        hidden: Residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; divides ``num_heads``.
        head_dim: Dimensions of one head.
    """

    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_key_value_heads={self.num_kv_heads} does not divide num_attention_heads={self.num_heads}"
            )

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @classmethod
    def from_config(
        cls, config: ModelConfig, *, hidden: str = "hidden_size", heads: str = "num_attention_heads"
    ) -> AttentionShape:
        """Reads the widths under their Hugging Face names.

        Raises:
            ConfigError: Without ``head_dim``, the hidden width is not a multiple of the heads.
        """
        width, num_heads = config.count(hidden), config.count(heads)
        if config.values.get("head_dim") is None and width % num_heads:
            raise ConfigError(f"{hidden}={width} is not a multiple of {heads}={num_heads}, and there is no head_dim")
        return cls(
            hidden=width,
            num_heads=num_heads,
            num_kv_heads=config.count("num_key_value_heads", num_heads),
            head_dim=config.count("head_dim", max(width // num_heads, 1)),
        )
