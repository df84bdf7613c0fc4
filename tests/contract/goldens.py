"""Golden cases of published predictions, as histories and graphs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sidecast.graphs.topology import Block, BlockKind, EdgeType, NodeRange, ParameterView, Topology
from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History
from sidecast.predictors.graph_cache import GraphCache, NeuralGraph

NAMES = [
    "convnet",
    "convnet_mixed",
    "convnet_wnnplus_h32",
    "gpt2",
    "gpt2_inner",
    "llama_gqa_tied",
    "llama_gqa_tied_wnnplus",
    "llama_gqa_untied",
    "llama_mha_tied",
    "llama_mqa_untied",
    "llama_wide_heads",
    "mlp",
    "qwen3_gqa_tied",
    "qwen3_wide_heads",
]


@dataclass(frozen=True)
class Golden:
    """One golden case; arrays are those of the npz file."""

    name: str
    checkpoint: Path
    history: History
    graph: NeuralGraph
    horizons: tuple[int, ...]
    arrays: dict[str, np.ndarray]

    def cache(self) -> GraphCache:
        """A cache that answers with this case's graph and encoding, whatever the model."""
        return GraphCache(build=lambda manifest, layout, lpe_dim: self.graph)

    def expected(self, horizon: int) -> tuple[Tensor, Tensor]:
        """Scaled and unscaled prediction, each of P elements."""
        return (
            torch.from_numpy(self.arrays[f"scaled_prediction_k{horizon}"]),
            torch.from_numpy(self.arrays[f"prediction_k{horizon}"]),
        )


def load_golden(folder: Path, name: str) -> Golden:
    """Reads a case; blocks' parameter views are recovered from which element each edge carries."""
    description = json.loads((folder / "golden" / f"{name}.json").read_text())
    with np.load(folder / "golden" / f"{name}.npz") as file:
        arrays = dict(file)
    manifest = ModelManifest.from_shapes(description["parameters"], description["config"])
    states = [torch.from_numpy(column.copy()) for column in arrays["states"].T]
    blocks = tuple(_block(entry, arrays["edge_element"], manifest) for entry in description["blocks"])
    topology = Topology(description["kind"], "official", description["num_nodes"], blocks, manifest.parameters)
    lpe = torch.from_numpy(arrays["lpe"]) if "lpe" in arrays else torch.zeros(topology.num_nodes, 8)
    return Golden(
        name,
        folder / description["checkpoint"],
        History(manifest, states),
        NeuralGraph(topology, lpe),
        tuple(description["horizons"]),
        arrays,
    )


def _block(entry: dict, edge_element: np.ndarray, manifest: ModelManifest) -> Block:
    source, target = NodeRange(*entry["src"]), NodeRange(*entry["dst"])
    block = Block(
        name=entry["name"],
        edge_type=EdgeType(entry["edge_type"]),
        source=source,
        target=target,
        kind=BlockKind(entry["kind"]),
        source_major=entry["order"] == "source-major",
    )
    first, last = entry["edges"]
    elements = edge_element[first:last]
    if elements[0, 0] < 0:
        return block
    num_kernel = int((elements[0] >= 0).sum())
    elements = elements[:, :num_kernel].astype(np.int64)
    fqn = next(n for n in reversed(manifest.offsets) if manifest.offsets[n] <= elements.min())
    elements -= manifest.offsets[fqn]
    if block.kind is BlockKind.DIAGONAL:
        grid = elements[:, None]
    elif block.source_major:
        grid = elements.reshape(len(source), len(target), num_kernel)
    else:
        grid = elements.reshape(len(target), len(source), num_kernel).swapaxes(0, 1)
    shape = manifest.spec(fqn).shape
    rows, columns = shape if len(shape) == 2 else (1, 1)
    for transposed in (None, (rows, columns)):
        flat = grid if transposed is None else (grid % columns) * rows + grid // columns
        steps = [int(flat[1, 0, 0] - flat[0, 0, 0]) if flat.shape[0] > 1 else 0]
        steps.append(int(flat[0, 1, 0] - flat[0, 0, 0]) if flat.shape[1] > 1 else 0)
        steps.append(int(flat[0, 0, 1] - flat[0, 0, 0]) if flat.shape[2] > 1 else 0)
        view = ParameterView(
            fqn=fqn,
            offset=int(flat[0, 0, 0]),
            source_stride=steps[0],
            target_stride=steps[1],
            kernel_stride=steps[2],
            num_kernel_elements=num_kernel,
            transposed_shape=transposed,
        )
        axes = np.ogrid[: flat.shape[0], : flat.shape[1], : flat.shape[2]]
        if (flat == view.offset + sum(axis * step for axis, step in zip(axes, steps, strict=True))).all():
            return replace(block, view=view)
    raise AssertionError(f"{entry['name']}: no strided view explains its elements")
