"""``--names FILE``: what other people call the parameters of a family, as regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from sidecast.errors import ConfigError, one_line, shown
from sidecast.manifest import NAMES_KEY, ModelManifest

_ARROW = "->"


def with_names(manifest: ModelManifest, path: Path) -> ModelManifest:
    """The manifest of a checkpoint whose parameters have other names than their family gives them.

    Args:
        manifest: Under the checkpoint's own names, which it keeps; its graph is drawn under the others.
        path: A line ``PATTERN -> REPLACEMENT`` for each rule, as in ``re.sub``; every rule is applied to every name,
            one after another. Lines that are empty or begin with ``#`` say nothing.

    Raises:
        ConfigError: The file cannot be read, a line is no rule, no rule fits any name, or two parameters get one name.
    """
    rules = list(_rules(path))
    names = [*(spec.fqn for spec in manifest.parameters), *manifest.aliases]
    renamed = {}
    for name in names:
        plain = name
        for line, pattern, replacement in rules:
            try:
                plain = pattern.sub(replacement, plain)
            except (re.error, IndexError) as error:
                raise ConfigError(f"--names {path}, line {line}: {shown(replacement)}: {one_line(error)}") from error
        if plain != name:
            renamed[name] = plain
    if not renamed:
        raise ConfigError(f"--names {path} has no rule that fits a parameter; the first one is {shown(names[0])}")
    found: dict[str, str] = {}
    for name in names:
        plain = renamed.get(name, name)
        if plain in found:
            raise ConfigError(f"--names {path} gives {shown(found[plain])} and {shown(name)} one name: {shown(plain)}")
        found[plain] = name
    return replace(manifest, config={**manifest.config, NAMES_KEY: renamed})


def _rules(path: Path) -> Iterable[tuple[int, re.Pattern[str], str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--names {path} cannot be read: {one_line(error)}") from error
    for number, text in enumerate(lines, 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        pattern, arrow, replacement = text.partition(_ARROW)
        if not arrow or not pattern.strip():
            raise ConfigError(
                f"--names {path}, line {number} is {shown(text)}; it must be PATTERN {_ARROW} REPLACEMENT"
            )
        try:
            yield number, re.compile(pattern.strip()), replacement.strip()
        except re.error as error:
            raise ConfigError(f"--names {path}, line {number}: {shown(pattern.strip())}: {one_line(error)}") from error
