"""What read-outs are evaluated on: the operator of the service names it, and no client has a say in it.

Shape suffixes: N rows, T tokens of a row; one row of all tokens stands for a text that may be cut anywhere.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sidecast.errors import ConfigError, one_line, shown
from sidecast.nowcaster_service.config import (
    PROBE_OPTION,
    PROBE_TEXT_SUFFIX,
    PROBE_TOKEN_SUFFIXES,
    TOKENIZER_OPTION,
    is_probe_file,
)

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENS = 1 << 24
MIN_ROW_TOKENS = 2
_FUNCTION = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*")
_NAME_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class ProbeSource:
    """A probe that can be used.

    Attributes:
        name: Tells it from others: losses of probes with different names are not compared.
        function: ``module:function``, which makes a loss of weights; empty where tokens do.
        tokens_NT: Token ids, int64; None where a function makes the loss.
        is_text: Whether the tokens are one text, to be cut into rows.
    """

    name: str
    function: str = ""
    tokens_NT: np.ndarray | None = None
    is_text: bool = False

    def fault(self, config: Mapping[str, Any]) -> str:
        """Why the probe says nothing of a model, as far as its configuration tells; empty if it may.

        Args:
            config: The model's configuration.
        """
        if self.tokens_NT is None:
            return ""
        vocab_size = text_config(config).get("vocab_size")
        if not isinstance(config.get("model_type"), str) or not isinstance(vocab_size, int):
            return "the probe is one of tokens, and the model's configuration has no model_type and vocab_size"
        newest = int(self.tokens_NT.max())
        if newest >= vocab_size:
            return f"the probe's token ids reach {newest}; the model's vocab_size is {shown(vocab_size)}"
        return ""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a model's configuration that is about text."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) else config


def read_source(probe: str, tokenizer: Path | None) -> ProbeSource:
    """Reads what ``--probe`` names. No code is run: that of a function is loaded where it is called.

    Args:
        probe: A file of token ids (``.npy``, ``.safetensors``), of text (``.txt``), or ``module:function``.
        tokenizer: Folder of the text's tokenizer.

    Raises:
        ConfigError: It is none of these, cannot be read, or holds something else.
    """
    if (tokenizer is not None) != probe.endswith(PROBE_TEXT_SUFFIX):
        raise ConfigError(
            f"{PROBE_OPTION} is {shown(probe)}; {TOKENIZER_OPTION} is for {PROBE_TEXT_SUFFIX} files, which need it"
        )
    if not is_probe_file(probe):
        return _function_source(probe)
    path = Path(probe)
    try:
        tokens = _text_tokens(path, tokenizer) if tokenizer is not None else _array(path)
    except ConfigError:
        raise
    except Exception as error:  # whatever a torn file makes its reader stumble over
        raise ConfigError(f"{PROBE_OPTION} {path} cannot be read: {one_line(error)}") from error
    _check_tokens(path, tokens)
    tokens_NT = np.atleast_2d(tokens).astype(np.int64)
    digest = hashlib.blake2b(tokens_NT.tobytes(), digest_size=_NAME_BYTES, person=f"{tokens.ndim}".encode())
    return ProbeSource(name=f"tokens {digest.hexdigest()}", tokens_NT=tokens_NT, is_text=tokens.ndim == 1)


def _function_source(probe: str) -> ProbeSource:
    if not _FUNCTION.fullmatch(probe):
        raise ConfigError(
            f"{PROBE_OPTION} is {shown(probe)}; allowed: a file {', '.join(PROBE_TOKEN_SUFFIXES)} or "
            f"{PROBE_TEXT_SUFFIX}, or MODULE:FUNCTION"
        )
    package = probe.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"{PROBE_OPTION} is {shown(probe)}; there is no module {package} here")
    return ProbeSource(name=f"function {probe}", function=probe)


def _array(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        array: np.ndarray = np.load(path, allow_pickle=False)
        return array
    from safetensors.numpy import load_file

    tensors = load_file(path)
    if len(tensors) != 1:
        raise ConfigError(f"{PROBE_OPTION} {path} holds {len(tensors)} tensors; allowed: one, of token ids")
    return next(iter(tensors.values()))


def _text_tokens(path: Path, folder: Path) -> np.ndarray:
    # A library of its own: transformers would take seconds, and may run a folder's code.
    from tokenizers import Tokenizer

    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise ConfigError(f"{TOKENIZER_OPTION} {folder} has no {TOKENIZER_FILE}")
    text = path.read_text(encoding="utf-8")
    return np.array(Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids, dtype=np.int64)


def _check_tokens(path: Path, tokens: np.ndarray) -> None:
    if tokens.dtype.kind not in "iu" or tokens.ndim not in (1, 2):
        raise ConfigError(
            f"{PROBE_OPTION} {path} holds {tokens.dtype} of shape {tokens.shape}; allowed: integers, in one row or in "
            "several of one length"
        )
    if not (tokens.size and tokens.shape[-1] >= MIN_ROW_TOKENS and tokens.size <= MAX_TOKENS):
        raise ConfigError(
            f"{PROBE_OPTION} {path} holds token ids of shape {tokens.shape}; allowed: {MIN_ROW_TOKENS} or more in a "
            f"row, at most {MAX_TOKENS} in all"
        )
    if tokens.min() < 0 or int(tokens.max()) >= 1 << 31:
        raise ConfigError(
            f"{PROBE_OPTION} {path} holds token ids from {tokens.min()} to {tokens.max()}; allowed: 0 to 2^31 - 1"
        )
