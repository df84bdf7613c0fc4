"""Widths of a GPT-2 and where its fused tensors keep queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from sidecast.errors import ConfigError
from sidecast.graphs.assembler import MatrixSlice, TopologyAssembler, VectorSlice
from sidecast.graphs.model_config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Gpt2Shape:
    """Widths of a GPT-2.

    Attributes:
        prefix: ``transformer.`` if the decoder is wrapped in a model with a head, nothing if it is bare.
        hidden: Residual stream.
        num_layers: Transformer blocks.
        num_heads: Attention heads.
        inner_width: Hidden units of the MLP.
        vocab_size: Rows of the token table.
        num_positions: Rows of the position table.
        is_tied: Whether the output layer is the token table.
        is_linear: Whether matrices are of shape (outputs, inputs), as of ``torch.nn.Linear`` (nanoGPT).
    """

    prefix: str
    hidden: int
    num_layers: int
    num_heads: int
    inner_width: int
    vocab_size: int
    num_positions: int
    is_tied: bool
    is_linear: bool

    @classmethod
    def from_config(cls, assembler: TopologyAssembler, config: ModelConfig) -> Gpt2Shape:
        """Reads the widths under their Hugging Face names.

        Raises:
            ConfigError: The hidden width is not a multiple of the heads, or there is cross-attention.
        """
        hidden, num_heads = config.count("n_embd"), config.count("n_head")
        if hidden % num_heads:
            raise ConfigError(f"n_embd={hidden} is not a multiple of n_head={num_heads}")
        if config.flag("add_cross_attention", False):
            raise ConfigError("add_cross_attention=True: cross-attention has no place in the graph of a GPT-2")
        is_wrapped = assembler.has_prefix("transformer.")
        inner = config.count("n_inner", 4 * hidden)
        # Of nn.Linear, (outputs, inputs). Some may be frozen; the square one of the attention's output tells nothing.
        as_linear = {
            ".attn.c_attn.weight": (3 * hidden, hidden),
            ".mlp.c_fc.weight": (inner, hidden),
            ".mlp.c_proj.weight": (hidden, inner),
        }
        return cls(
            prefix="transformer." if is_wrapped else "",
            hidden=hidden,
            num_layers=config.count("n_layer"),
            num_heads=num_heads,
            inner_width=inner,
            vocab_size=config.count("vocab_size"),
            num_positions=config.count("n_positions"),
            is_tied=config.flag("tie_word_embeddings", True),
            is_linear=any(
                spec.fqn.endswith(name) and spec.shape == shape
                for spec in assembler.manifest.parameters
                for name, shape in as_linear.items()
                if shape[0] != shape[1]
            ),
        )

    @property
    def head_dim(self) -> int:
        return self.hidden // self.num_heads

    @property
    def has_head(self) -> bool:
        return bool(self.prefix)

    def fused_projections(self, fused: str) -> tuple[MatrixSlice, MatrixSlice, MatrixSlice]:
        """Queries, keys and values in ``c_attn.weight``, of shape (inputs, 3 x outputs) or its transpose."""
        width = self.hidden
        query, key, value = (
            MatrixSlice(
                fqn=f"{fused}.weight",
                shape=(3 * width, width) if self.is_linear else (width, 3 * width),
                offset=part * width * (width if self.is_linear else 1),
                input_stride=1 if self.is_linear else 3 * width,
                output_stride=width if self.is_linear else 1,
            )
            for part in range(3)
        )
        return query, key, value

    def projection(self, name: str, num_inputs: int, num_outputs: int) -> MatrixSlice:
        """A weight of its own, whichever way it is stored."""
        stored = MatrixSlice.linear if self.is_linear else MatrixSlice.transposed
        return stored(f"{name}.weight", num_inputs, num_outputs)

    def fused_biases(self, fused: str) -> tuple[VectorSlice, VectorSlice, VectorSlice]:
        """Queries, keys and values in ``c_attn.bias``."""
        width = self.hidden
        query, key, value = (
            VectorSlice(fqn=f"{fused}.bias", shape=(3 * width,), offset=part * width) for part in range(3)
        )
        return query, key, value
