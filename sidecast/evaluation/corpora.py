"""Texts to train on that a machine without a network has; the only file of this package that reads any."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidecast.errors import ConfigError

# Debian ships the library without its tests; leaving them out keeps the corpus alike between machines.
_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_VALIDATION_STRIDE = 10
_WORDNET = Path("/usr/share/wordnet")


@dataclass(frozen=True)
class Corpus:
    """Bytes of a text.

    Attributes:
        train_tokens: One-dimensional, uint8: what is trained on.
        validation_tokens: One-dimensional, uint8: what is held out.
        origin: Where the text comes from, for people.
    """

    train_tokens: Tensor
    validation_tokens: Tensor
    origin: str

    @cached_property
    def digest(self) -> str:
        """Equal if and only if two runs read the same text."""
        digest = hashlib.blake2b(digest_size=16)
        for tokens_T in (self.train_tokens, self.validation_tokens):
            digest.update(len(tokens_T).to_bytes(8, "little"))
            digest.update(tokens_T.numpy().data)
        return digest.hexdigest()


def load_corpus(name: str, cache: Path | None = None) -> Corpus:
    """Reads a corpus.

    Args:
        name: One of ``CORPORA``.
        cache: A folder that keeps what was read, so that a run that is taken up again reads the same.

    Raises:
        ConfigError: There is no corpus of that name, or nothing of it on this machine.
    """
    if name not in CORPORA:
        raise ConfigError(f"corpus is {name!r}; allowed: {', '.join(CORPORA)}")
    path = None if cache is None else cache / f"{name}.npz"
    if path is not None and path.exists():
        with np.load(path, allow_pickle=False) as kept:
            return Corpus(torch.from_numpy(kept["train"]), torch.from_numpy(kept["validation"]), str(kept["origin"]))
    origin, documents = CORPORA[name]()
    corpus = _split(name, documents, origin)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".tmp.npz")
        np.savez(
            unfinished,
            train=corpus.train_tokens.numpy(),
            validation=corpus.validation_tokens.numpy(),
            origin=np.array(origin),
        )
        unfinished.replace(path)
    return corpus


def _split(name: str, documents: Iterator[bytes], origin: str) -> Corpus:
    kept: list[bytes] = []
    held_out: list[bytes] = []
    for index, document in enumerate(documents):
        (held_out if index % _VALIDATION_STRIDE == _VALIDATION_STRIDE - 1 else kept).append(document)
    if not held_out:
        raise ConfigError(f"corpus {name!r} has fewer than {_VALIDATION_STRIDE} documents on this machine ({origin})")
    splits = [torch.from_numpy(np.frombuffer(b"".join(part), dtype=np.uint8).copy()) for part in (kept, held_out)]
    return Corpus(splits[0], splits[1], origin)


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
    return [path for path in paths if path.is_file() and not _EXCLUDED.intersection(path.relative_to(root).parts)]


def _python_source() -> tuple[str, Iterator[bytes]]:
    files = _stdlib_files()
    return f"{len(files)} files of the running interpreter's library", (path.read_bytes() for path in files)


def _english() -> tuple[str, Iterator[bytes]]:
    """Definitions of WordNet where it is installed; else the interpreter's manual pages and its docstrings."""
    files = sorted(_WORDNET.glob("data.*"))
    if files:
        return f"definitions of {len(files)} files in {_WORDNET}", _definitions(files)
    return "language reference (pydoc_data.topics) and docstrings of the running interpreter's library", _docstrings()


def _definitions(files: list[Path]) -> Iterator[bytes]:
    for path in files:
        glosses = [line.split(" | ", 1)[1].strip() for line in path.read_text().splitlines() if " | " in line]
        for start in range(0, len(glosses), 100):
            yield ("\n".join(glosses[start : start + 100]) + "\n").encode()


def _docstrings() -> Iterator[bytes]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name].encode()
    for path in _stdlib_files():
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue
        nodes = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        texts = [text for text in (ast.get_docstring(node) for node in nodes) if text and len(text) > 80]
        if texts:
            yield ("\n\n".join(texts) + "\n").encode()


CORPORA: dict[str, Callable[[], tuple[str, Iterator[bytes]]]] = {
    "python-source": _python_source,
    "english": _english,
}
