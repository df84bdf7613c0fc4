"""The configurations of the partition matrix, shared by the test and by the worker that runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One DeepSpeed configuration.

    Attributes:
        stage: ZeRO stage.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        zero: Further keys of ``zero_optimization``.
        settings: Further top-level keys of the DeepSpeed configuration.
        model: ``llama`` or ``scalar``, which has fewer elements than some ranks.
        frozen: Whether part of the model is frozen.
        groups: Number of parameter groups.
        fused: Whether DeepSpeed is to believe that the optimizer is its fused one, and flatten the masters.
    """

    stage: int
    dtype: str
    zero: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = "llama"
    frozen: bool = False
    groups: int = 1
    fused: bool = False


# How many checks a case passes when none fails; counted, so that none can be dropped unseen.
NUM_CHECKS = 11
STAGES = (0, 1, 2, 3)
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
# Nothing stays gathered, and the parameters fall into several sub-groups.
PARTITIONED = {"stage3_param_persistence_threshold": 0, "sub_group_size": 200}
FP32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
BF16_MASTERS = {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}


def plain(*dtypes: str) -> dict[str, Case]:
    return {f"stage{stage}-{dtype}": Case(stage=stage, dtype=dtype) for stage in STAGES for dtype in dtypes}


CASES_OF_WORLD_SIZE: dict[int, dict[str, Case]] = {
    1: {
        **plain("bf16"),
        "stage2-fp16-offload": Case(stage=2, dtype="fp16", zero=OFFLOADED),
        "stage1-bf16-optimizer": Case(stage=1, dtype="bf16", settings=FP32_ACCUMULATION),
    },
    2: {
        **plain("fp32", "bf16", "fp16"),
        "stage0-bf16-fused": Case(stage=0, dtype="bf16", fused=True, groups=2),
        "stage0-fp16-fused": Case(stage=0, dtype="fp16", fused=True),
        "stage0-fp32-frozen": Case(stage=0, dtype="fp32", frozen=True, groups=2),
        "stage1-bf16-round-robin": Case(stage=1, dtype="bf16", zero={"round_robin_gradients": True}),
        "stage1-fp32-offload": Case(stage=1, dtype="fp32", zero=OFFLOADED),
        "stage1-bf16-optimizer": Case(stage=1, dtype="bf16", settings=FP32_ACCUMULATION, groups=2),
        "stage2-bf16-masters": Case(stage=2, dtype="bf16", settings=BF16_MASTERS),
        "stage2-bf16-offload": Case(stage=2, dtype="bf16", zero=OFFLOADED, frozen=True),
        "stage2-fp32-round-robin": Case(stage=2, dtype="fp32", zero={"round_robin_gradients": True}, groups=2),
        "stage3-bf16-offload": Case(stage=3, dtype="bf16", zero={**OFFLOADED, "offload_param": {"device": "cpu"}}),
        "stage3-bf16-partitioned": Case(stage=3, dtype="bf16", zero=PARTITIONED, frozen=True, groups=2),
    },
    3: {
        **plain("fp32", "bf16"),
        **{f"stage{stage}-scalar": Case(stage=stage, dtype="fp32", model="scalar") for stage in STAGES},
        "stage1-bf16-optimizer": Case(stage=1, dtype="bf16", settings=FP32_ACCUMULATION, frozen=True),
        "stage2-fp16-round-robin": Case(
            stage=2, dtype="fp16", zero={"round_robin_gradients": True, **OFFLOADED}, groups=2
        ),
        "stage3-fp16-partitioned": Case(stage=3, dtype="fp16", zero=PARTITIONED, frozen=True, groups=2),
    },
}

# Trained twice, with the hook attached and without it: what holds the masters differs in each.
ATTACHED_CASES: dict[str, Case] = {
    **plain("bf16"),
    "stage0-fp32": Case(stage=0, dtype="fp32"),
    "stage1-bf16-optimizer": Case(stage=1, dtype="bf16", settings=FP32_ACCUMULATION),
}
ATTACHED_WORLD_SIZE = 2
