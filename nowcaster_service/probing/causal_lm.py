"""The loss of a causal language model on rows of tokens, for any weights of it, in fp32.

The model is made of the configuration that a client has sent: none but transformers' own classes, nothing is fetched,
and no key that would choose other code is looked at.

Shape suffixes: P elements of the parameter vector, N rows, T tokens of a row, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_module_registration_hook

from sidecast.errors import ConfigError, one_line, shown
from sidecast.manifest import ModelManifest, unwrapped_name
from sidecast.nowcaster_service.probing.source import MIN_ROW_TOKENS, ProbeSource, text_config

# A text is cut into rows of so many tokens, or fewer where the model takes fewer.
ROW_TOKENS = 512
# Logits of one forward pass, but those of one row at least: 64 MiB.
MAX_LOGITS = 1 << 24
MAX_BUFFER_BYTES = 256 << 20
# Some hold no parameter of their own, and some several.
MAX_MODULES_PER_PARAMETER = 16
# What could name other code, or other numbers than fp32.
_LEFT_OUT = frozenset(
    {
        "auto_map",
        "quantization_config",
        "dtype",
        "torch_dtype",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_experts_implementation",
        "_experts_implementation_internal",
        "use_kernels",
    }
)


class CausalLmLoss:
    """Mean loss of the next token, in nats, over all rows of a probe; the same bits for the same weights.

    Keeps the model that was used last.

    Args:
        source: With tokens.
        device: Where the model computes.
    """

    def __init__(self, source: ProbeSource, device: str) -> None:
        assert source.tokens_NT is not None
        self._tokens_NT = torch.from_numpy(source.tokens_NT)
        self._is_text = source.is_text
        self._device = device
        self._schema_hash = ""
        self._model: Any = None

    @torch.inference_mode()
    def __call__(self, manifest: ModelManifest, vector_P: Tensor) -> float:
        """The loss of one parameter vector.

        Args:
            manifest: Of the model.
            vector_P: Its weights, fp32.

        Raises:
            ConfigError: The configuration is of no causal language model, or of one with other parameters than those
                of the vector; or the model takes no rows so long.
        """
        if self._schema_hash != manifest.schema_hash:
            # Before the next one takes its memory.
            self._model, self._schema_hash = None, ""
            self._model, self._schema_hash = causal_lm_of(manifest).to(self._device).eval(), manifest.schema_hash
        named = dict(self._model.named_parameters(remove_duplicate=False))
        for spec in manifest.parameters:
            start = manifest.offsets[spec.fqn]
            named[unwrapped_name(spec.fqn)].copy_(vector_P[start : start + spec.numel].view(spec.shape))
        return self._loss()

    def _loss(self) -> float:
        rows_NT = self._rows()
        vocab_size = int(text_config(self._model.config.to_dict())["vocab_size"])
        num_together = max(1, MAX_LOGITS // (rows_NT.shape[1] * vocab_size))
        total = 0.0
        for batch_NT in rows_NT.split(num_together):
            batch_NT = batch_NT.to(self._device)
            logits_NTV = self._model(input_ids=batch_NT, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits_NTV.flatten(0, 1).float(), batch_NT[:, 1:].flatten(), reduction="sum"
            )
            total += float(losses)
        return total / (rows_NT[:, 1:].numel())

    def _rows(self) -> Tensor:
        num_tokens = self._tokens_NT.shape[1]
        # GPT-2's has another name in its file.
        limit = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        limit = limit if isinstance(limit, int) and limit >= MIN_ROW_TOKENS else num_tokens
        if not self._is_text:
            if num_tokens > limit:
                raise ConfigError(f"the probe's rows have {num_tokens} tokens; the model takes {limit}")
            return self._tokens_NT
        length = min(ROW_TOKENS, limit, num_tokens)
        return self._tokens_NT[0, : num_tokens // length * length].view(-1, length)


def causal_lm_of(manifest: ModelManifest) -> Any:
    """The model of a manifest's configuration, in fp32 on the CPU, with weights that mean nothing.

    Raises:
        ConfigError: transformers is missing or cannot make it; or it has other parameters than the manifest.
    """
    config = _plain(manifest.config)
    _check_depth(config, len(manifest.parameters))
    # Without memory first: what a client's configuration would take is not known before.
    with torch.device("meta"), _few_modules(MAX_MODULES_PER_PARAMETER * len(manifest.parameters)):
        outline = _made(config)
    _check_parameters(outline, manifest)
    num_bytes = sum(buffer.nbytes for buffer in outline.buffers())
    if num_bytes > MAX_BUFFER_BYTES:
        raise ConfigError(f"the model has buffers of {num_bytes} bytes; a probe allows {MAX_BUFFER_BYTES}")
    with torch.random.fork_rng(devices=[]):
        return _made(config)


@contextmanager
def _few_modules(limit: int) -> Iterator[None]:
    """Ends the making of a model that has more modules: those, too, take memory."""
    left = limit

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ConfigError(f"the model has more than {limit} modules")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


def _made(config: Mapping[str, Any]) -> Any:
    try:
        from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    except ImportError as error:
        raise ConfigError("a probe of tokens needs transformers in the service's environment") from error
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ConfigError(f"transformers does not know the model_type={shown(model_type)} of the run's configuration")
    try:
        made = AutoModelForCausalLM.from_config(
            CONFIG_MAPPING[model_type].from_dict(dict(config)),
            attn_implementation="eager",
            dtype=torch.float32,
            trust_remote_code=False,
        )
    except Exception as error:  # transformers raises whatever it stumbles over
        raise ConfigError(
            f"transformers cannot make a causal language model of model_type={shown(model_type)}: {one_line(error)}"
        ) from error
    return made


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key not in _LEFT_OUT
    }


def _check_depth(config: Mapping[str, Any], num_parameters: int) -> None:
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_depth(value, num_parameters)
        elif isinstance(value, int) and "layer" in key and value > num_parameters:
            raise ConfigError(
                f"the model's configuration has {shown(key)}={shown(value)}; the run has {num_parameters} parameters"
            )


def _check_parameters(model: Any, manifest: ModelManifest) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters(remove_duplicate=False)}
    own = {name for name, _ in model.named_parameters()}
    given = {unwrapped_name(spec.fqn): spec.shape for spec in manifest.parameters}
    given |= {unwrapped_name(alias): manifest.spec(fqn).shape for alias, fqn in manifest.aliases.items()}
    for name in sorted(own - given.keys()):
        raise ConfigError(f"the run does not train {shown(name)}, whose values a probe would lack")
    for name, shape in given.items():
        if name not in expected:
            raise ConfigError(f"the model of the run's configuration has no parameter {shown(name)}")
        if expected[name] != shape:
            raise ConfigError(f"{shown(name)} has shape {shape}, and {expected[name]} by the run's configuration")
