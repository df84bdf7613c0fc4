"""Qwen3: Llama with normalised queries and keys."""

from __future__ import annotations

from functools import partial

from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.builders.decoder_symmetric import draw_decoder_symmetric
from sidecast.graphs.builders.llama_official import draw_llama_official

BUILDER = GraphBuilder(
    family="qwen3",
    model_types=("qwen3",),
    layouts={
        "official": partial(draw_llama_official, has_qk_norm=True),
        "symmetric": partial(draw_decoder_symmetric, has_qk_norm=True),
    },
)
