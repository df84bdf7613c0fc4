"""Llama, Mistral, which has the same parameters, and Qwen2, which adds biases."""

from __future__ import annotations

from functools import partial

from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.builders.decoder_symmetric import draw_decoder_symmetric
from sidecast.graphs.builders.llama_official import draw_llama_official

BUILDER = GraphBuilder(
    family="llama",
    model_types=("llama", "mistral"),
    layouts={"official": draw_llama_official, "symmetric": draw_decoder_symmetric},
)
QWEN2_BUILDER = GraphBuilder(
    family="qwen2",
    model_types=("qwen2",),
    # The published layout has no place for the biases that every one of them has.
    layouts={"symmetric": partial(draw_decoder_symmetric, has_qkv_bias=True)},
)
