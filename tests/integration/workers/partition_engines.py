"""Small DeepSpeed engines of every kind, and their training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from tests.integration.workers.partition_cases import Case

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# With these and the sizes below, neither two nor three ranks divide a parameter or a group of them evenly.
VOCABULARY = 30


class ScalarModel(nn.Module):
    """Three trained elements: with three ranks, some hold nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.5))
        self.shift = nn.Parameter(torch.full((2,), 0.25))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        x = input_ids.to(self.scale.dtype) / VOCABULARY
        predicted = x * self.scale + self.shift.sum()
        return {"loss": (predicted - labels / VOCABULARY).pow(2).mean()}


def build_model(case: Case) -> nn.Module:
    torch.manual_seed(7)
    if case.model == "scalar":
        return ScalarModel()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=13,
        intermediate_size=17,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    if case.frozen:
        model.model.layers[0].mlp.gate_proj.weight.requires_grad_(False)
        model.model.norm.weight.requires_grad_(False)
    return model


def build_engine(case: Case, nowcaster: dict[str, Any] | None = None) -> Any:
    model = build_model(case)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if case.groups == 2:
        groups = [
            {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": 0.1},
            {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
        ]
    else:
        groups = [{"params": parameters, "weight_decay": 0.1}]
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": case.stage, **case.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **case.settings,
    }
    if nowcaster is not None:
        config["nowcaster"] = nowcaster
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True, **config.get("bf16", {})}
    if case.dtype == "fp16":
        # Small enough not to overflow, and growing within the few steps of a case.
        config["fp16"] = {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}
    with fused_optimizer(case.fused):
        engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    return engine


@contextmanager
def fused_optimizer(fused: bool) -> Iterator[None]:
    """Makes DeepSpeed take AdamW for its fused optimizer, which needs a GPU or a compiler."""
    if not fused:
        yield
        return
    import deepspeed.runtime.engine as engine_module

    original = engine_module.FusedAdam
    engine_module.FusedAdam = torch.optim.AdamW
    try:
        yield
    finally:
        engine_module.FusedAdam = original


def train(engine: Any, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
        tokens = torch.randint(0, VOCABULARY, (2, 9), generator=generator)
        loss = engine(input_ids=tokens, labels=tokens)["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses
