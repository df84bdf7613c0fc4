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


PLAIN = {
    f"stage{stage}-{dtype}": Case(stage=stage, dtype=dtype) for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")
}
CASES_OF_WORLD_SIZE: dict[int, dict[str, Case]] = {2: PLAIN}
