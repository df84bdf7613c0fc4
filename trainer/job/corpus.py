"""The text of a run as token ids, split into what is trained on and what is held out."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidecast.errors import ConfigError, one_line
from sidecast.trainer.job.config import DataConfig

BYTE_VOCAB_SIZE = 256
HUB_PREFIX = "hf:"
# Debian ships the library without its tests; leaving them out keeps the corpus alike between machines.
STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Corpus:
    """Tokens of a run.

    Attributes:
        train_tokens: Token ids that are trained on, in their smallest integer type.
        validation_tokens: Token ids that are held out, of the same type.
        vocab_size: Number of token ids that the tokenizer may give.
    """

    train_tokens: Tensor
    validation_tokens: Tensor
    vocab_size: int

    @cached_property
    def digest(self) -> str:
        """Hex digest of all tokens: equal if and only if two runs read the same data."""
        digest = hashlib.blake2b(digest_size=16)
        for tokens_T in (self.train_tokens, self.validation_tokens):
            digest.update(len(tokens_T).to_bytes(8, "little"))
            digest.update(tokens_T.numpy().data)
        return digest.hexdigest()


def load_corpus(config: DataConfig) -> Corpus:
    """Reads and tokenizes the corpus.

    Every k-th document is held out, where there are enough of them; otherwise the end of the text is.

    Raises:
        ConfigError: The corpus is missing, empty or too short, or the tokenizer cannot be loaded.
    """
    encode, vocab_size = _load_tokenizer(config.tokenizer)
    stride = round(1 / config.validation_fraction)
    dtype = _token_dtype(vocab_size)
    documents = [np.asarray(encode(text), dtype=dtype) for text in _documents(config)]
    if not any(len(tokens) for tokens in documents):
        raise ConfigError(f"training.data.corpus {config.corpus!r} is empty; it must hold text")
    if len(documents) >= 10 * stride:
        held_out = documents[stride - 1 :: stride]
        kept = [tokens for index, tokens in enumerate(documents) if index % stride != stride - 1]
    else:
        tokens = np.concatenate(documents)
        cut = len(tokens) - max(1, int(len(tokens) * config.validation_fraction))
        kept, held_out = [tokens[:cut]], [tokens[cut:]]
    splits = [torch.from_numpy(np.concatenate(part)) for part in (kept, held_out)]
    for name, tokens_T in zip(("train", "validation"), splits, strict=True):
        if len(tokens_T) <= config.sequence_length:
            raise ConfigError(
                f"training.data.corpus {config.corpus!r} has {len(tokens_T)} tokens in its {name} part; "
                f"it must have more than training.data.sequence_length, {config.sequence_length}"
            )
    return Corpus(splits[0], splits[1], vocab_size)


def _documents(config: DataConfig) -> Iterator[bytes]:
    if config.corpus == "stdlib":
        yield from _files(Path(sysconfig.get_paths()["stdlib"]), "*.py", STDLIB_EXCLUDED)
    elif config.corpus.startswith(HUB_PREFIX):
        yield from _dataset_rows(config)
    else:
        path = Path(config.corpus)
        if not path.exists():
            raise ConfigError(
                f"training.data.corpus is {config.corpus!r}, which does not exist; "
                f"allowed are 'stdlib', a text file, a directory of text files, or '{HUB_PREFIX}NAME'"
            )
        yield from _files(path, "*") if path.is_dir() else [path.read_bytes()]


def _files(root: Path, pattern: str, excluded: frozenset[str] = frozenset()) -> Iterator[bytes]:
    for path in sorted(root.rglob(pattern), key=lambda path: path.relative_to(root).as_posix()):
        if path.is_file() and not excluded.intersection(path.relative_to(root).parts):
            yield path.read_bytes()


def _dataset_rows(config: DataConfig) -> Iterator[bytes]:
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"training.data.corpus {config.corpus!r} needs the package 'datasets', which is not installed"
        ) from error
    name = config.corpus.removeprefix(HUB_PREFIX)
    try:
        rows = datasets.load_dataset(name, split=config.split)
    except Exception as error:  # the library raises its own, fsspec's and the network's errors
        raise ConfigError(
            f"training.data.corpus {config.corpus!r}, split {config.split!r}, cannot be loaded: {one_line(error)}"
        ) from error
    if config.text_column not in rows.column_names:
        raise ConfigError(
            f"training.data.text_column is {config.text_column!r}; "
            f"{config.corpus!r} has the columns {', '.join(rows.column_names)}"
        )
    for row in rows:
        yield row[config.text_column].encode()


def _load_tokenizer(name: str) -> tuple[Callable[[bytes], object], int]:
    if name == "bytes":
        return lambda text: np.frombuffer(text, dtype=np.uint8), BYTE_VOCAB_SIZE
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as with datasets: hub, parser and operating system all have their own
        raise ConfigError(
            f"training.data.tokenizer {name!r} cannot be loaded; allowed are 'bytes' and the name or directory of a "
            f"Hugging Face tokenizer ({one_line(error)})"
        ) from error
    return lambda text: tokenizer(text.decode(errors="replace"), verbose=False)["input_ids"], len(tokenizer)


def _token_dtype(vocab_size: int) -> type[np.unsignedinteger] | type[np.signedinteger]:
    if vocab_size <= 1 << 8:
        return np.uint8
    return np.int16 if vocab_size <= 1 << 15 else np.int32
