"""Reads values of files that anybody may have written: each as the type that is needed, or refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.errors import ConfigError, shown


@dataclass(frozen=True)
class Field:
    """A value, and where it was found.

    Attributes:
        file: The file that holds it.
        name: What messages call it, such as ``param_shapes[0]['w']``; empty for the file's whole content.
        value: Anything.
    """

    file: Path
    name: str
    value: Any

    def refused(self, needed: str) -> ConfigError:
        """The refusal of this value."""
        what = (
            f"a {self.value.layout} tensor of {self.value.dtype} on {self.value.device}"
            if isinstance(self.value, Tensor)
            else shown(self.value)
        )
        return ConfigError(f"{self.file}: {self.name or 'its content'} is {what}; {needed} is needed")

    @property
    def is_absent(self) -> bool:
        """Whether there is no such value, or a null."""
        return self.value is None

    def get(self, key: str) -> Field:
        """An entry of a dictionary; one that is absent has the value None.

        Raises:
            ConfigError: This is no dictionary with names for keys.
        """
        return Field(self.file, f"{self.name}[{key!r}]" if self.name else repr(key), self._mapping().get(key))

    def entries(self) -> dict[str, Field]:
        """All entries of a dictionary.

        Raises:
            ConfigError: This is no dictionary with names for keys.
        """
        return {key: self.get(key) for key in self._mapping()}

    def items(self) -> list[Field]:
        """The items of a list.

        Raises:
            ConfigError: This is no list.
        """
        if not isinstance(self.value, list | tuple):
            raise self.refused("a list")
        return [Field(self.file, f"{self.name}[{index}]", item) for index, item in enumerate(self.value)]

    def names(self) -> list[str]:
        """A list of strings.

        Raises:
            ConfigError: This is none.
        """
        if not isinstance(self.value, list | tuple | set | frozenset):
            raise self.refused("a list of names")
        for name in self.value:
            Field(self.file, f"an item of {self.name}", name).text()
        return list(self.value)

    def text(self) -> str:
        """A string.

        Raises:
            ConfigError: This is none.
        """
        if not isinstance(self.value, str):
            raise self.refused("a string")
        return self.value

    def count(self) -> int:
        """An integer of at least 0.

        Raises:
            ConfigError: This is none.
        """
        if isinstance(self.value, bool) or not isinstance(self.value, int) or self.value < 0:
            raise self.refused("an integer of at least 0")
        return self.value

    def shape(self) -> tuple[int, ...]:
        """A tensor's shape.

        Raises:
            ConfigError: This is none.
        """
        return tuple(size.count() for size in self.items())

    def tensor(self) -> Tensor:
        """A dense tensor in memory or a mapped file, without gradient.

        Raises:
            ConfigError: This is none.
        """
        value = self.value
        is_plain = (
            isinstance(value, Tensor)
            and value.layout is torch.strided
            and value.device.type == "cpu"
            and not value.is_quantized
        )
        if not is_plain:
            raise self.refused("a dense tensor")
        return value.detach()

    def floating(self) -> Tensor:
        """A dense tensor of 16-bit or wider floating elements.

        Raises:
            ConfigError: This is none.
        """
        tensor = self.tensor()
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise self.refused("a tensor of 16-bit or wider floating elements")
        return tensor

    def _mapping(self) -> Mapping[str, Any]:
        if not isinstance(self.value, dict):
            raise self.refused("a dict")
        for key in self.value:
            if not isinstance(key, str):
                raise Field(self.file, f"a key of {self.name or 'its content'}", key).refused("a name")
        return self.value
