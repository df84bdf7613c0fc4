"""Llama, and Mistral, which has the same parameters."""

from __future__ import annotations

from sidecast.graphs.builders.llama_official import draw_llama_official
from sidecast.graphs.registry import GraphBuilder

BUILDER = GraphBuilder(
    family="llama",
    model_types=("llama", "mistral"),
    layouts={"official": draw_llama_official},
)
