"""Small models of every family, with an input, for the tests of symmetry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from sidecast.graphs import Topology, build_topology, manifest_of_chain, manifest_of_module
from sidecast.manifest import ModelManifest


@dataclass(frozen=True)
class SmallModel:
    """A model in float64, its manifest and an input.

    Attributes:
        module: The network, in evaluation mode.
        manifest: Its trainable parameters and configuration.
        inputs: Arguments of a call.
    """

    module: nn.Module
    manifest: ModelManifest
    inputs: tuple[Tensor, ...]

    def topology(self, layout: str = "symmetric") -> Topology:
        return build_topology(self.manifest, layout)

    def output(self, vector_P: NDArray[np.float64]) -> Tensor:
        """The network's output with these parameters."""
        parameters, position = {}, 0
        for spec in self.manifest.parameters:
            values = vector_P[position : position + spec.numel]
            parameters[spec.fqn] = torch.from_numpy(values).reshape(spec.shape)
            position += spec.numel
        with torch.no_grad():
            output = functional_call(self.module, parameters, self.inputs)
        for name in ("logits", "last_hidden_state"):
            output = getattr(output, name, output)
        return output

    def random_vectors(self, rng: np.random.Generator, num_vectors: int) -> NDArray[np.float64]:
        """Parameter vectors as columns: norm weights near 1, all others near 0."""
        parts = []
        for spec in self.manifest.parameters:
            is_norm = len(spec.shape) == 1 and spec.fqn.endswith("weight")
            parts.append(rng.standard_normal((spec.numel, num_vectors)) * 0.4 + float(is_norm))
        return np.concatenate(parts)


def hugging_face(model_class: str, config: Any, *inputs: Tensor) -> SmallModel:
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        module = getattr(transformers, model_class)(config).double().eval()
    for part in module.modules():
        if type(part).__name__.endswith("RMSNorm"):
            part.forward = partial(_rms_norm, part)
        if type(part).__name__ == "MixtralTopKRouter":
            part.forward = partial(_route, part)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]
    return SmallModel(module, ModelManifest.from_shapes(shapes, config.to_dict()), inputs)


def _rms_norm(module: Any, x: Tensor) -> Tensor:
    # The library's own computes in fp32, whatever it is given.
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def _route(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # So does its router.
    logits = nn.functional.linear(x.reshape(-1, module.hidden_dim), module.weight)
    score, expert = torch.topk(torch.softmax(logits, dim=-1), module.top_k, dim=-1)
    return logits, score / score.sum(dim=-1, keepdim=True), expert


def token_ids(vocab_size: int, length: int = 7) -> Tensor:
    return torch.randint(0, vocab_size, (2, length), generator=torch.Generator().manual_seed(3))


DECODER = {
    "hidden_size": 12,
    "intermediate_size": 9,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 11,
    "max_position_embeddings": 16,
}


def small_decoder(name: str, **options: Any) -> SmallModel:
    config = getattr(transformers, f"{name}Config")(**{**DECODER, **options})
    # The fused kernel of the experts does not know float64.
    config._experts_implementation = "eager"
    return hugging_face(f"{name}ForCausalLM", config, token_ids(11))


def _gpt2() -> SmallModel:
    config = transformers.GPT2Config(
        n_embd=12, n_layer=2, n_head=3, n_inner=9, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    return hugging_face("GPT2LMHeadModel", config, token_ids(11))


ENCODER = {"hidden_size": 12, "intermediate_size": 9, "num_hidden_layers": 2, "num_attention_heads": 3}


def _bert(model_class: str) -> SmallModel:
    config = transformers.BertConfig(**ENCODER, vocab_size=11, max_position_embeddings=8)
    return hugging_face(model_class, config, token_ids(11))


def _vit() -> SmallModel:
    config = transformers.ViTConfig(**ENCODER, image_size=8, patch_size=4)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return hugging_face("ViTForImageClassification", config, pixels)


def _chain(*layers: nn.Module, shape: tuple[int, ...]) -> SmallModel:
    module = nn.Sequential(*layers).double().eval()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return SmallModel(module, manifest_of_chain(module, inputs), (inputs,))


def _mlp() -> SmallModel:
    return _chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 3), shape=(4, 6))


def _convolutions() -> SmallModel:
    layers = [nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5)]
    return _chain(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3), shape=(3, 2, 8, 8))


def traced(module: nn.Module, *inputs: Tensor) -> SmallModel:
    return SmallModel(module.double().eval(), manifest_of_module(module, inputs), inputs)


def _by_axes(model: SmallModel) -> SmallModel:
    """The same network, drawn as if its family had no builder."""
    return SmallModel(model.module, manifest_of_module(model.module, model.inputs), model.inputs)


class ResidualNet(nn.Module):
    """A small ResNet: a large stem kernel, an identity and a projected shortcut, a grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 7, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.shortcut = nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = x + torch.relu(self.norm1(self.conv1(x)))
        y = self.depthwise(torch.relu(self.norm2(self.conv2(x))))
        x = nn.functional.adaptive_avg_pool2d(torch.relu(y + self.shortcut(x)), 2)
        return self.head(torch.flatten(x, 1))


class RecurrentNet(nn.Module):
    """Embeds tokens, runs two recurrent layers and classifies by the last output."""

    def __init__(self, kind: type[nn.RNNBase], *, bidirectional: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.recurrent = kind(6, 5, num_layers=2, batch_first=True, bidirectional=bidirectional)
        self.head = nn.Linear(10 if bidirectional else 5, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.recurrent(self.embedding(tokens))
        return self.head(outputs[:, -1])


def _residual_net() -> SmallModel:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return traced(ResidualNet(), pixels)


SMALL_MODELS: dict[str, Callable[[], SmallModel]] = {
    "llama": lambda: small_decoder("Llama", tie_word_embeddings=False),
    "llama_tied": lambda: small_decoder("Llama", tie_word_embeddings=True),
    "llama_biases": lambda: small_decoder("Llama", attention_bias=True, mlp_bias=True),
    "mistral": lambda: small_decoder("Mistral"),
    "qwen2": lambda: small_decoder("Qwen2", num_attention_heads=2, num_key_value_heads=1, head_dim=6),
    "qwen3": lambda: small_decoder("Qwen3"),
    "mixtral": lambda: small_decoder("Mixtral", num_local_experts=3, num_experts_per_tok=2),
    "gpt2": _gpt2,
    "bert_mlm": lambda: _bert("BertForMaskedLM"),
    "bert_classifier": lambda: _bert("BertForSequenceClassification"),
    "vit": _vit,
    "llama_by_axes": lambda: _by_axes(small_decoder("Llama", tie_word_embeddings=False)),
    "gpt2_by_axes": lambda: _by_axes(_gpt2()),
    "mlp": _mlp,
    "convolutions": _convolutions,
    "residual_net": _residual_net,
    "lstm": lambda: traced(RecurrentNet(nn.LSTM), token_ids(11)),
    "gru_bidirectional": lambda: traced(RecurrentNet(nn.GRU, bidirectional=True), token_ids(11)),
}
