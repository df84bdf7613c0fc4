"""A small GPT-2, for M members at once: layer norms, learned positions, biases, GELU, tied embeddings.

Shape suffixes: M members, P elements of the parameter vector, B sequences, L tokens of a sequence, N = B * L tokens,
D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from sidecast.errors import ConfigError
from sidecast.evaluation.models.model import Weight, cross_entropies, embed, join
from sidecast.manifest import ModelManifest


@dataclass(frozen=True, kw_only=True)
class Gpt2Config:
    """Dimensions of a small GPT-2; the hidden width is four times the width."""

    vocab_size: int = 256
    width: int = 64
    num_layers: int = 3
    num_heads: int = 4
    max_positions: int = 64
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ConfigError(f"num_heads is {self.num_heads}; it must divide width, {self.width}")

    def build(self) -> Gpt2:
        """The model."""
        return Gpt2(self)


class Gpt2:
    """Implements ``Model`` with the parameters, names and order of Hugging Face's ``GPT2LMHeadModel``; no dropout.

    Args:
        config: Dimensions.
    """

    def __init__(self, config: Gpt2Config) -> None:
        self.config = config
        self.manifest = ModelManifest.from_shapes(
            _shapes(config), _hf_config(config), {"lm_head.weight": "transformer.wte.weight"}
        )

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The weights, one for each parameter."""
        return tuple(join(self.manifest, spec.fqn, [spec.fqn], spec.shape) for spec in self.manifest.parameters)

    def initial(self, seed: int) -> Tensor:
        """Normally distributed matrices, narrower where they write into the residual stream; norms 1, biases 0."""
        generator = torch.Generator().manual_seed(seed)
        narrow = self.config.init_std / math.sqrt(2 * self.config.num_layers)
        parts = []
        for spec in self.manifest.parameters:
            if len(spec.shape) == 2:
                std = narrow if spec.fqn.endswith("c_proj.weight") else self.config.init_std
                parts.append(torch.empty(spec.shape).normal_(0.0, std, generator=generator))
            else:
                parts.append(torch.full(spec.shape, 1.0 if spec.fqn.endswith("weight") else 0.0))
        return torch.cat([part.flatten() for part in parts])

    def losses(self, weights: Mapping[str, Tensor], tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """See ``Model.losses``."""
        num_sequences, length = tokens_BL.shape
        embedding_MVD = weights["transformer.wte.weight"]
        positions_MLD = weights["transformer.wpe.weight"][:, :length]
        x_MND = embed(embedding_MVD, tokens_BL) + positions_MLD.repeat(1, num_sequences, 1)
        for layer in range(self.config.num_layers):
            block = f"transformer.h.{layer}."
            x_MND = x_MND + self._attention(weights, block, self._norm(weights, block + "ln_1", x_MND), length)
            hidden = functional.gelu(
                linear(weights, block + "mlp.c_fc", self._norm(weights, block + "ln_2", x_MND)), approximate="tanh"
            )
            x_MND = x_MND + linear(weights, block + "mlp.c_proj", hidden)
        return cross_entropies(self._norm(weights, "transformer.ln_f", x_MND) @ embedding_MVD.mT, targets_BL)

    def _attention(self, weights: Mapping[str, Tensor], block: str, x_MND: Tensor, length: int) -> Tensor:
        num_members, num_tokens, width = x_MND.shape
        num_heads = self.config.num_heads
        heads = linear(weights, block + "attn.c_attn", x_MND)
        heads = heads.view(num_members * num_tokens // length, length, 3 * num_heads, width // num_heads)
        q, k, v = heads.transpose(1, 2).chunk(3, 1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(weights, block + "attn.c_proj", mixed.transpose(1, 2).reshape(num_members, num_tokens, width))

    def _norm(self, weights: Mapping[str, Tensor], name: str, x_MND: Tensor) -> Tensor:
        normed = functional.layer_norm(x_MND, x_MND.shape[-1:], eps=self.config.norm_eps)
        return normed * weights[name + ".weight"][:, None] + weights[name + ".bias"][:, None]


def linear(weights: Mapping[str, Tensor], name: str, x_MND: Tensor) -> Tensor:
    """A projection with a bias, whose weight is stored inputs first."""
    return torch.baddbmm(weights[name + ".bias"][:, None], x_MND, weights[name + ".weight"])


def _shapes(config: Gpt2Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    width = config.width
    yield "transformer.wte.weight", (config.vocab_size, width)
    yield "transformer.wpe.weight", (config.max_positions, width)
    for layer in range(config.num_layers):
        block = f"transformer.h.{layer}."
        linears = {"attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width)}
        linears |= {"mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width)}
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            shape = linears.get(name, (width,))
            yield f"{block}{name}.weight", shape
            yield f"{block}{name}.bias", shape[-1:]
    yield "transformer.ln_f.weight", (width,)
    yield "transformer.ln_f.bias", (width,)


def _hf_config(config: Gpt2Config) -> dict[str, object]:
    """What Hugging Face calls the dimensions; it selects the graph that predictors see."""
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": None,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": True,
    }
