"""One file per family of models; each draws its layouts."""

from sidecast.graphs.builders import llama, qwen3
from sidecast.graphs.registry import GraphBuilder

BUILDERS: tuple[GraphBuilder, ...] = (llama.BUILDER, qwen3.BUILDER)

__all__ = ["BUILDERS"]
