"""A tiny training job with the hook attached, shared by the workers of the end-to-end tests."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

import deepspeed
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.integrations.deepspeed import hook_of
from tests.support.pacing import Pacer

VOCABULARY = 31
SEQUENCE = 16


def start_process_group() -> int:
    """Joins the launcher's process group; returns this process's rank."""
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    return int(os.environ["RANK"])


def new_engine(nowcaster: Mapping[str, Any] | None, *, stage: int = 2, dtype: str = "fp32", seed: int = 3) -> Any:
    """A DeepSpeed engine around a small tied Llama whose sizes divide unevenly among ranks."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=12,
            intermediate_size=17,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=4,
            max_position_embeddings=SEQUENCE,
            tie_word_embeddings=True,
        )
    )
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
    }
    if dtype == "bf16":
        settings["bf16"] = {"enabled": True}
    if nowcaster is not None:
        settings["nowcaster"] = dict(nowcaster)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    return engine


def train(engine: Any, rank: int, first_step: int = 0) -> Iterator[float]:
    """Trains for ever on counting upwards, going on after some steps; yields the loss of each step."""
    for step in count(first_step):
        generator = torch.Generator().manual_seed(1000 * rank + step)
        start = torch.randint(VOCABULARY, (2, 1), generator=generator)
        ids = (start + torch.arange(SEQUENCE)) % VOCABULARY
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        yield loss.item()


def pacer_of(engine: Any) -> Pacer:
    """Holds an attached engine's steps back until what they have set going has ended on all ranks."""
    nowcaster = hook_of(engine)
    assert isinstance(nowcaster, NowcastHook)
    return Pacer.of_group(nowcaster)
