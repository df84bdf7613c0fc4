"""Llama models as manifests: the published shapes, without weights."""

from __future__ import annotations

from dataclasses import dataclass

from sidecast.manifest import ModelManifest


@dataclass(frozen=True, kw_only=True)
class LlamaSize:
    """Widths of one Llama model."""

    hidden: int
    inner: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    is_tied: bool = False

    def manifest(self) -> ModelManifest:
        """Names, shapes and configuration of the model."""
        head_dim = self.hidden // self.num_heads
        kv_width = self.num_kv_heads * head_dim
        shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (self.vocab_size, self.hidden))]
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}"
            shapes += [
                (f"{name}.self_attn.q_proj.weight", (self.hidden, self.hidden)),
                (f"{name}.self_attn.k_proj.weight", (kv_width, self.hidden)),
                (f"{name}.self_attn.v_proj.weight", (kv_width, self.hidden)),
                (f"{name}.self_attn.o_proj.weight", (self.hidden, self.hidden)),
                (f"{name}.mlp.gate_proj.weight", (self.inner, self.hidden)),
                (f"{name}.mlp.up_proj.weight", (self.inner, self.hidden)),
                (f"{name}.mlp.down_proj.weight", (self.hidden, self.inner)),
                (f"{name}.input_layernorm.weight", (self.hidden,)),
                (f"{name}.post_attention_layernorm.weight", (self.hidden,)),
            ]
        shapes.append(("model.norm.weight", (self.hidden,)))
        if not self.is_tied:
            shapes.append(("lm_head.weight", (self.vocab_size, self.hidden)))
        config = {
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocab_size,
            "tie_word_embeddings": self.is_tied,
        }
        return ModelManifest.from_shapes(shapes, config)


def _tiny(hidden: int, num_layers: int) -> LlamaSize:
    return LlamaSize(
        hidden=hidden, inner=3 * hidden, num_layers=num_layers, num_heads=4, num_kv_heads=2, vocab_size=256
    )


LLAMA_SIZES = {
    "100K": _tiny(32, 5),
    "400K": _tiny(64, 6),
    "1M": _tiny(96, 7),
    "160M": LlamaSize(hidden=768, inner=3072, num_layers=12, num_heads=12, num_kv_heads=12, vocab_size=32000),
    "1B": LlamaSize(
        hidden=2048, inner=8192, num_layers=16, num_heads=32, num_kv_heads=8, vocab_size=128256, is_tied=True
    ),
    "8B": LlamaSize(hidden=4096, inner=14336, num_layers=32, num_heads=32, num_kv_heads=8, vocab_size=128256),
    "70B": LlamaSize(hidden=8192, inner=28672, num_layers=80, num_heads=64, num_kv_heads=8, vocab_size=128256),
    "405B": LlamaSize(hidden=16384, inner=53248, num_layers=126, num_heads=128, num_kv_heads=8, vocab_size=128256),
}
