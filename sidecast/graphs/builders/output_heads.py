"""What reads a decoder's last stream: the language model's output layer, or a head for labels and rewards."""

from __future__ import annotations

from sidecast.graphs.assembler import TopologyAssembler
from sidecast.graphs.topology import EdgeType, NodeRange

_LABEL_HEADS = ("score", "classifier")


def draw_output_head(assembler: TopologyAssembler, stream: NodeRange, num_tokens: int, *, is_tied: bool) -> None:
    """Draws the head that the manifest has: of a classifier or a reward model, else of a language model.

    Args:
        assembler: Takes the nodes and blocks.
        stream: What the head reads.
        num_tokens: Rows of the token table.
        is_tied: Whether the language model's output layer is the token table, and has no edges of its own.
    """
    name = next((name for name in _LABEL_HEADS if assembler.has(f"{name}.weight")), None)
    if name is None:
        if not is_tied:
            logits = assembler.nodes(num_tokens, "logits", is_boundary=True)
            assembler.linear("lm_head.weight", stream, logits)
        return
    labels = assembler.nodes(assembler.manifest.spec(f"{name}.weight").shape[0], f"{name}.labels", is_boundary=True)
    assembler.linear(f"{name}.weight", stream, labels)
    if assembler.has(f"{name}.bias"):
        one = assembler.nodes(1, f"{name}.bias", is_boundary=True)
        assembler.vector(f"{name}.bias", one, labels, EdgeType.BIAS)
