"""Models of ``transformers`` from a configuration, at full size without memory or at tiny widths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sidecast.errors import ConfigError, one_line, shown

_PARTS = ("text_config", "decoder")
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
    for part in (config.get(key) for key in _PARTS):
        # A class for the language model alone takes that part's configuration.
        if isinstance(part, Mapping) and part.get("model_type") == config_class.model_type != config.get("model_type"):
            config = part
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            return model_class(config_class.from_dict(dict(config)))
    except Exception as error:  # transformers raises whatever it stumbles over
        problem = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"transformers cannot make a {name} of this configuration: {problem}") from error


def example_inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """What a model of transformers is called with.

    Raises:
        ConfigError: It takes neither tokens nor pixels.
    """
    generator = torch.Generator().manual_seed(3)
    name, config = model.main_input_name, model.config
    if name == "input_ids":
        text = config.get_text_config()
        # Classifiers look for the last token that is no padding, and take one sequence where nothing is padding.
        is_classifier = type(model).__name__.endswith("ForSequenceClassification")
        num_sequences = 1 if is_classifier and text.pad_token_id is None else 2
        return {name: torch.randint(0, text.vocab_size, (num_sequences, _NUM_TOKENS), generator=generator)}
    if name == "pixel_values":
        shape = (2, config.num_channels, config.image_size, config.image_size)
        return {name: torch.randn(shape, generator=generator)}
    raise ConfigError(f"{type(model).__name__} takes {name!r}; a check knows input_ids and pixel_values")


def _causal_lm_of(model_type: object) -> str | None:
    """The class of causal language models of that type, for a configuration that was written by hand."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(model_type))
    return name if isinstance(name, str) else None
