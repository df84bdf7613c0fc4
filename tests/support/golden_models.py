"""Golden cases as manifests: the published layout of fourteen small models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sidecast.manifest import ModelManifest

# The golden files name what they were made from, not a Hugging Face model type.
MODEL_TYPES = {
    "llama": "llama",
    "qwen3": "qwen3",
    "gpt2": "gpt2",
    "convnet": "sequential",
    "convmixed": "sequential",
    "mlp": "sequential",
}
GOLDEN_NAMES = (
    "llama_gqa_tied",
    "llama_gqa_tied_wnnplus",
    "llama_gqa_untied",
    "llama_mha_tied",
    "llama_mqa_untied",
    "llama_wide_heads",
    "qwen3_gqa_tied",
    "qwen3_wide_heads",
    "gpt2",
    "gpt2_inner",
    "convnet",
    "convnet_mixed",
    "convnet_wnnplus_h32",
    "mlp",
)


@dataclass(frozen=True)
class GoldenCase:
    """One golden case.

    Attributes:
        description: Contents of the JSON file.
        arrays: Contents of the NPZ file.
        manifest: The model.
    """

    description: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    manifest: ModelManifest

    @classmethod
    def load(cls, nino_data: Path, name: str) -> GoldenCase:
        description = json.loads((nino_data / "golden" / f"{name}.json").read_text())
        with np.load(nino_data / "golden" / f"{name}.npz") as archive:
            arrays = dict(archive)
        config = {"model_type": MODEL_TYPES[description["kind"]], **description["config"]}
        return cls(description, arrays, ModelManifest.from_shapes(description["parameters"], config))
