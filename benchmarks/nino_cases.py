"""Models and histories that the predictor benchmarks share, and how one nowcast is measured."""

from __future__ import annotations

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from sidecast.manifest import ModelManifest
from sidecast.predictors.base import History, Predictor
from sidecast.predictors.file_workspace import predict_with_files
from sidecast.predictors.nino.config import NinoConfig
from sidecast.predictors.nino.weights import NinoWeights

CONTEXT_LEN = 5


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """A Llama-like model by its sizes; embeddings are tied."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int

    def manifest(self) -> ModelManifest:
        hidden, inner = self.hidden_size, self.intermediate_size
        kv = hidden // self.num_attention_heads * self.num_key_value_heads
        shapes: list[tuple[str, list[int]]] = [("model.embed_tokens.weight", [self.vocab_size, hidden])]
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            shapes += [
                (f"{prefix}.self_attn.q_proj.weight", [hidden, hidden]),
                (f"{prefix}.self_attn.k_proj.weight", [kv, hidden]),
                (f"{prefix}.self_attn.v_proj.weight", [kv, hidden]),
                (f"{prefix}.self_attn.o_proj.weight", [hidden, hidden]),
                (f"{prefix}.mlp.gate_proj.weight", [inner, hidden]),
                (f"{prefix}.mlp.up_proj.weight", [inner, hidden]),
                (f"{prefix}.mlp.down_proj.weight", [hidden, inner]),
                (f"{prefix}.input_layernorm.weight", [hidden]),
                (f"{prefix}.post_attention_layernorm.weight", [hidden]),
            ]
        shapes.append(("model.norm.weight", [hidden]))
        config = {"model_type": "llama", "tie_word_embeddings": True, **vars(self)}
        return ModelManifest.from_shapes(shapes, config)


SHAPES = {
    "0.2M": LlamaShape(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
    ),
    "1M": LlamaShape(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
    ),
    "2M": LlamaShape(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=2000,
    ),
    "10M": LlamaShape(
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=8,
        num_attention_heads=10,
        num_key_value_heads=5,
        vocab_size=2000,
    ),
    "100M": LlamaShape(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=14,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=8000,
    ),
    "SmolLM2-135M": LlamaShape(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
    ),
}


def random_history(manifest: ModelManifest) -> History:
    """A random walk, as training is on short distances."""
    generator = torch.Generator().manual_seed(0)
    states = [torch.empty(manifest.num_elements).normal_(std=0.05, generator=generator)]
    for _ in range(CONTEXT_LEN - 1):
        step = torch.empty(manifest.num_elements).normal_(std=0.002, generator=generator)
        states.append(step.add_(states[-1]))
    return History(manifest, states)


def random_weights() -> NinoWeights:
    """A NiNo network of the published size."""
    generator = torch.Generator().manual_seed(0)
    config = NinoConfig()
    tensors = {
        name: torch.randn(shape, generator=generator) / max(1, shape[-1]) ** 0.5
        for name, shape in config.shapes().items()
    }
    return NinoWeights(config, tensors, "random")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One nowcast. CPU seconds are those of all threads: they tell more than wall seconds on a busy machine."""

    wall_s: float
    cpu_s: float
    extra_bytes: int


def measure(predictor: Predictor, history: History, horizon_intervals: int) -> Measurement:
    """Times one nowcast in this process as the service makes it, with files for what takes much memory.

    Memory is what the process has resident at most, above what history and result take.
    """
    out = torch.zeros(history.manifest.num_elements)
    before_bytes = _resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        predict_with_files(predictor, history, horizon_intervals, out, Path(folder))
        wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    return Measurement(wall_s=wall_s, cpu_s=cpu_s, extra_bytes=_high_water_bytes() - before_bytes)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _high_water_bytes() -> int:
    line = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
