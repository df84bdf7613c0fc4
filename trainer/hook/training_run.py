"""What the hook is put on: a training run, whoever drives its loop."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sidecast.manifest import GRAPH_ATTRIBUTE
from sidecast.trainer.partitions import Layout


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One rank of a training run.

    Attributes:
        map_layout: Finds out what this rank holds of the model, anew at each call: a loaded checkpoint may move it.
        applied_steps: Optimizer steps applied so far.
        model_config: The model's configuration as plain JSON values; empty for models that have none.
        local_rank: This rank's number on its host.
        stage: Who holds the weights, for the metrics: a ZeRO stage, ``fsdp2`` or ``none``.
    """

    map_layout: Callable[[], Layout]
    applied_steps: Callable[[], int]
    model_config: Mapping[str, Any]
    local_rank: int
    stage: str


def model_config_of(module: Any) -> dict[str, Any]:
    """The description of the graph that a module keeps, or a Hugging Face model's configuration; empty for others."""
    remembered = getattr(module, GRAPH_ATTRIBUTE, None)
    if isinstance(remembered, Mapping):
        return dict(remembered)
    to_json_string = getattr(getattr(module, "config", None), "to_json_string", None)
    return {} if to_json_string is None else dict(json.loads(to_json_string(use_diff=False)))
