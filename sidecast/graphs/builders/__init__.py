"""One file per family of models; each draws its layouts."""

from sidecast.graphs.builder import GraphBuilder
from sidecast.graphs.builders import axis_graph, bert, gpt2, llama, mixtral, module_graph, qwen3, sequential, vit

BUILDERS: tuple[GraphBuilder, ...] = (
    llama.BUILDER,
    llama.QWEN2_BUILDER,
    qwen3.BUILDER,
    mixtral.BUILDER,
    gpt2.BUILDER,
    bert.BUILDER,
    vit.BUILDER,
    sequential.BUILDER,
    module_graph.BUILDER,
    axis_graph.BUILDER,
)

__all__ = ["BUILDERS"]
