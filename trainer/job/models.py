"""The model of a run: a Llama of given dimensions, or any causal language model of Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from sidecast.errors import ConfigError, one_line
from sidecast.trainer.job.config import CausalLMConfig

CONFIG_NAME = "config.json"


def build_model(config: CausalLMConfig, *, vocab_size: int, sequence_length: int, seed: int) -> PreTrainedModel:
    """Builds the model in fp32, its random weights decided by ``seed`` alone.

    Args:
        config: Which model.
        vocab_size: Number of token ids that the corpus uses.
        sequence_length: Longest input, in tokens.
        seed: Seed of the initial weights; ignored where pretrained ones are loaded.

    Raises:
        ConfigError: ``config.source`` is no model that Hugging Face can read, or too small for the corpus.
    """
    torch.manual_seed(seed)
    if config.source is None:
        hf_config: PreTrainedConfig = llama_config(config, vocab_size, sequence_length)
        return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
    directory, hf_config = _read_source(Path(config.source))
    _check_fits(config.source, hf_config, vocab_size, sequence_length)
    try:
        if directory is None or config.from_scratch:
            return AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(directory, config=hf_config, dtype=torch.float32)
    except (ValueError, OSError) as error:
        raise ConfigError(f"training.model.source {config.source!r} cannot be built: {one_line(error)}") from error


def llama_config(config: CausalLMConfig, vocab_size: int, sequence_length: int) -> LlamaConfig:
    """The configuration of a Llama of the given dimensions, without special tokens."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=sequence_length,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def _read_source(source: Path) -> tuple[Path | None, PreTrainedConfig]:
    file = source / CONFIG_NAME if source.is_dir() else source
    if not file.is_file():
        raise ConfigError(
            f"training.model.source is {str(source)!r}, but there is no {file}; "
            f"give a Hugging Face model directory with a {CONFIG_NAME}, or a {CONFIG_NAME} itself"
        )
    try:
        values: dict[str, Any] = json.loads(file.read_text())
        hf_config = AutoConfig.for_model(**{"model_type": "<missing>", **values})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not a model configuration of Hugging Face: {one_line(error)}") from error
    hf_config.use_cache = False
    return (source if source.is_dir() else None), hf_config


def _check_fits(source: str, hf_config: PreTrainedConfig, vocab_size: int, sequence_length: int) -> None:
    model_vocab_size = getattr(hf_config.get_text_config(), "vocab_size", vocab_size)
    if model_vocab_size < vocab_size:
        raise ConfigError(
            f"training.model.source {source!r} has a vocabulary of {model_vocab_size}; "
            f"training.data.tokenizer needs at least {vocab_size}"
        )
    max_positions = getattr(hf_config.get_text_config(), "max_position_embeddings", None)
    if max_positions is not None and max_positions < sequence_length:
        raise ConfigError(
            f"training.data.sequence_length is {sequence_length}; "
            f"the model {source!r} takes at most {max_positions} positions"
        )
