"""Models of ``transformers`` from a configuration, at full size without memory or at tiny widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sidecast.errors import ConfigError, one_line, shown

# The same ratios of heads in small; what is absent or null in a configuration stays so.
_HEAD_DIM = 4
_TINY = {
    "intermediate_size": 9,
    "moe_intermediate_size": 9,
    "shared_expert_intermediate_size": 9,
    "n_inner": 9,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "vocab_size": 11,
    "max_position_embeddings": 16,
    "n_positions": 16,
    "image_size": 8,
    "patch_size": 4,
    "sliding_window": 4,
    "max_window_layers": 1,
}
_MOST = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
_LAYER_LISTS = ("layer_types", "mlp_layer_types")
_NUM_TOKENS = 7


def model_of_config(config: Mapping[str, Any], *, device: str) -> Any:
    """The model that a configuration describes, with random weights.

    Args:
        config: With ``architectures``, or the ``model_type`` of a causal language model.
        device: ``meta`` for shapes alone.

    Raises:
        ConfigError: transformers is missing, knows no such class, or cannot make a model of this configuration.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError("a model's shapes are read from its weights, or else need transformers") from error
    architectures = config.get("architectures") or [_causal_lm_of(config.get("model_type"))]
    name = architectures[0] if isinstance(architectures, list) else architectures
    try:
        model_class = getattr(transformers, str(name), None)
    except Exception as error:  # classes are imported when they are asked for, and theirs may be missing
        raise ConfigError(f"transformers cannot load {shown(name)} of 'architectures': {one_line(error)}") from error
    config_class = getattr(model_class, "config_class", None)
    if model_class is None or config_class is None:
        raise ConfigError(
            f"the configuration has architectures={shown(name)} and model_type={shown(config.get('model_type'))}; "
            "without weights it must name a class of transformers, or the type of a causal language model"
        )
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            return model_class(config_class.from_dict(dict(config)))
    except Exception as error:  # transformers raises whatever it stumbles over
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"transformers cannot make a {name} of this configuration: {problem}") from error


def shrunken(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of the same family and the same options, whose model takes next to no memory.

    Args:
        config: Of any size.

    Returns:
        Widths, layers and vocabulary made small. As many query heads stay in a group as can be told apart: one, two,
        or all.

    Raises:
        ConfigError: A number that it needs is none.
    """
    tiny = dict(config)
    for key, value in _TINY.items():
        if tiny.get(key) is not None:
            tiny[key] = value
    for key, value in _MOST.items():
        if tiny.get(key) is not None:
            tiny[key] = min(_count(config, key), value)
    for key in _TOKENS:
        if tiny.get(key) is not None:
            tiny[key] = 0
    for key in _LAYER_LISTS:
        if isinstance(tiny.get(key), list):
            tiny[key] = tiny[key][: _TINY["num_hidden_layers"]]
    for hidden, heads in (("hidden_size", "num_attention_heads"), ("n_embd", "n_head")):
        if tiny.get(heads) is None or tiny.get(hidden) is None:
            continue
        num_heads, groups = 3, _count(config, heads)
        if tiny.get("num_key_value_heads") is not None:
            groups = _count(config, "num_key_value_heads")
            is_grouped = 1 < groups < _count(config, heads)
            num_heads = 4 if is_grouped else 3
            tiny["num_key_value_heads"] = 2 if is_grouped else min(groups, num_heads)
        tiny[heads] = num_heads
        tiny[hidden] = num_heads * _HEAD_DIM
        if tiny.get("head_dim") is not None:
            # Wider heads than the stream has room for stay wider.
            is_wide = _count(config, "head_dim") * _count(config, heads) != _count(config, hidden)
            tiny["head_dim"] = _HEAD_DIM + 2 * is_wide
    return tiny


def example_inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """What a model of transformers is called with.

    Raises:
        ConfigError: It takes neither tokens nor pixels.
    """
    generator = torch.Generator().manual_seed(3)
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        return {name: torch.randint(0, config.vocab_size, (2, _NUM_TOKENS), generator=generator)}
    if name == "pixel_values":
        shape = (2, config.num_channels, config.image_size, config.image_size)
        return {name: torch.randn(shape, generator=generator)}
    raise ConfigError(f"{type(model).__name__} takes {name!r}; a check knows input_ids and pixel_values")


def _count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"the model's configuration has {key}={value!r}; it must be a positive integer")
    return value


def _causal_lm_of(model_type: object) -> str | None:
    """The class of causal language models of that type, for a configuration that was written by hand."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    return name if isinstance(name, str) else None
