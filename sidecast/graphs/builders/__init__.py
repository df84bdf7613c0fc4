"""One file per family of models; each draws its layouts."""

from sidecast.graphs.builders import gpt2, llama, qwen3, sequential
from sidecast.graphs.registry import GraphBuilder

BUILDERS: tuple[GraphBuilder, ...] = (llama.BUILDER, qwen3.BUILDER, gpt2.BUILDER, sequential.BUILDER)

__all__ = ["BUILDERS"]
