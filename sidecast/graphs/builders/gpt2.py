"""GPT-2, with its fused and transposed projections."""

from __future__ import annotations

from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.builders.gpt2_official import draw_gpt2_official
from sidecast.graphs.builders.gpt2_symmetric import draw_gpt2_symmetric

BUILDER = GraphBuilder(
    family="gpt2",
    model_types=("gpt2",),
    layouts={"official": draw_gpt2_official, "symmetric": draw_gpt2_symmetric},
)
