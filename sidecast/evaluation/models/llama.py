"""A small Llama, for M members at once: RMS norms, rotary positions, grouped queries, SwiGLU, tied embeddings.

Shape suffixes: M members, P elements of the parameter vector, B sequences, L tokens of a sequence, N = B * L tokens,
D width, V vocabulary, H query heads, G key-value heads, E head dimension, F hidden width.
"""

from __future__ import annotations

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
class LlamaConfig:
    """Dimensions of a small Llama; the default has 155,072 parameters."""

    vocab_size: int = 256
    width: int = 64
    hidden_width: int = 176
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    rope_theta: float = 10_000.0
    rms_eps: float = 1e-6
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_kv_heads is {self.num_kv_heads}; it must divide num_heads, {self.num_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; it must be even")

    @property
    def qkv_width(self) -> int:
        """Outputs of the query, key and value projections together."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def build(self) -> Llama:
        """The model."""
        return Llama(self)


class Llama:
    """Implements ``Model`` with the parameters, names and order of Hugging Face's ``LlamaForCausalLM``.

    Args:
        config: Dimensions.
    """

    def __init__(self, config: LlamaConfig) -> None:
        self.config = config
        self.manifest = ModelManifest.from_shapes(
            _shapes(config), _hf_config(config), {"lm_head.weight": "model.embed_tokens.weight"}
        )

    @cached_property
    def weights(self) -> tuple[Weight, ...]:
        """The weights; projections of the same inputs are one."""
        return tuple(_weights(self.config, self.manifest))

    def initial(self, seed: int) -> Tensor:
        """Normally distributed matrices, ones in the norms."""
        generator = torch.Generator().manual_seed(seed)
        parts = [
            torch.ones(spec.shape)
            if len(spec.shape) == 1
            else torch.empty(spec.shape).normal_(0.0, self.config.init_std, generator=generator)
            for spec in self.manifest.parameters
        ]
        return torch.cat([part.flatten() for part in parts])

    def losses(self, weights: Mapping[str, Tensor], tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """See ``Model.losses``."""
        eps = self.config.rms_eps
        x_MND = embed(weights["embedding"], tokens_BL)
        rotation = rotary(self.config, tokens_BL.shape[1], x_MND)
        for layer in range(self.config.num_layers):
            normed_MND = rms_norm(x_MND, weights[f"{layer}.attention_norm"], eps)
            x_MND = x_MND + self._attention(layer, weights, normed_MND, tokens_BL.shape[1], rotation)
            normed_MND = rms_norm(x_MND, weights[f"{layer}.mlp_norm"], eps)
            gate_MNF, up_MNF = (normed_MND @ weights[f"{layer}.gate_up"].mT).chunk(2, -1)
            x_MND = x_MND + (functional.silu(gate_MNF) * up_MNF) @ weights[f"{layer}.down"].mT
        logits_MNV = rms_norm(x_MND, weights["norm"], eps) @ weights["embedding"].mT
        return cross_entropies(logits_MNV, targets_BL)

    def _attention(
        self, layer: int, weights: Mapping[str, Tensor], x_MND: Tensor, length: int, rotation: tuple[Tensor, Tensor]
    ) -> Tensor:
        config = self.config
        num_members, num_tokens, _ = x_MND.shape
        heads = (x_MND @ weights[f"{layer}.qkv"].mT).view(
            num_members * num_tokens // length, length, -1, config.head_dim
        )
        # Sequences of all members are alike to the heads.
        q, k, v = heads.transpose(1, 2).split([config.num_heads, config.num_kv_heads, config.num_kv_heads], 1)
        mixed = functional.scaled_dot_product_attention(
            rotate(q, rotation), rotate(k, rotation), v, is_causal=True, enable_gqa=True
        )
        return mixed.transpose(1, 2).reshape(num_members, num_tokens, -1) @ weights[f"{layer}.out"].mT


def rms_norm(x_MND: Tensor, scale_MD: Tensor, eps: float) -> Tensor:
    """Scales every token to unit root mean square, and by each member's own weights."""
    return x_MND * torch.rsqrt(x_MND.square().mean(-1, keepdim=True) + eps) * scale_MD[:, None]


def rotary(config: LlamaConfig, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position, (L, E / 2) each, with the device and dtype of ``like``."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(length, dtype=torch.float32)[:, None] * config.rope_theta**-exponents
    return angles.cos().to(like), angles.sin().to(like)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (i, i + E / 2) of the last dimension by the position in the one before."""
    cosines_LE, sines_LE = rotation
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosines_LE - second * sines_LE, second * cosines_LE + first * sines_LE], -1)


def _shapes(config: LlamaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, q_width = config.width, config.num_heads * config.head_dim
    kv_width = config.num_kv_heads * config.head_dim
    yield "model.embed_tokens.weight", (config.vocab_size, width)
    for layer in range(config.num_layers):
        block = f"model.layers.{layer}."
        yield block + "self_attn.q_proj.weight", (q_width, width)
        yield block + "self_attn.k_proj.weight", (kv_width, width)
        yield block + "self_attn.v_proj.weight", (kv_width, width)
        yield block + "self_attn.o_proj.weight", (width, q_width)
        yield block + "mlp.gate_proj.weight", (config.hidden_width, width)
        yield block + "mlp.up_proj.weight", (config.hidden_width, width)
        yield block + "mlp.down_proj.weight", (width, config.hidden_width)
        yield block + "input_layernorm.weight", (width,)
        yield block + "post_attention_layernorm.weight", (width,)
    yield "model.norm.weight", (width,)


def _weights(config: LlamaConfig, manifest: ModelManifest) -> Iterator[Weight]:
    def one(name: str, fqn: str) -> Weight:
        return join(manifest, name, [fqn], manifest.spec(fqn).shape)

    yield one("embedding", "model.embed_tokens.weight")
    for layer in range(config.num_layers):
        block = f"model.layers.{layer}."
        qkv = [f"{block}self_attn.{letter}_proj.weight" for letter in "qkv"]
        yield join(manifest, f"{layer}.qkv", qkv, (config.qkv_width, config.width))
        yield one(f"{layer}.out", block + "self_attn.o_proj.weight")
        gate_up = [block + "mlp.gate_proj.weight", block + "mlp.up_proj.weight"]
        yield join(manifest, f"{layer}.gate_up", gate_up, (2 * config.hidden_width, config.width))
        yield one(f"{layer}.down", block + "mlp.down_proj.weight")
        yield one(f"{layer}.attention_norm", block + "input_layernorm.weight")
        yield one(f"{layer}.mlp_norm", block + "post_attention_layernorm.weight")
    yield one("norm", "model.norm.weight")


def _hf_config(config: LlamaConfig) -> dict[str, object]:
    """What Hugging Face calls the dimensions; it selects the graph that predictors see."""
    return {
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.rms_eps,
        "tie_word_embeddings": True,
    }
