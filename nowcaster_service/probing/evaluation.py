"""Evaluating one vector of a run on the probe, over a file on this node. Free of Ray and gRPC."""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sidecast.errors import ConfigError, SidecastError, one_line, shown
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.config import ServiceConfig
from sidecast.nowcaster_service.probing.causal_lm import CausalLmLoss
from sidecast.nowcaster_service.probing.source import ProbeSource, read_source
from sidecast.nowcaster_service.vector_files import map_vector

NICENESS = 10
Loss = Callable[[ModelManifest, Tensor], float]


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """One vector to be evaluated.

    Attributes:
        manifest_json: The model.
        vector_path: File of P fp32 values on this node.
    """

    manifest_json: str
    vector_path: Path


@dataclass(frozen=True, kw_only=True)
class ProbeAnswer:
    """What came of it. ``refusal`` says why there is no loss, and is empty if there is one.

    ``is_hopeless``: it would be the same for any other weights of the run.
    """

    refusal: str = ""
    is_hopeless: bool = False
    loss: float = 0.0
    probe_s: float = 0.0


class Probing:
    """Evaluates vectors, one after another.

    Args:
        source: What on.
        device: Where a language model computes; a function of the operator's chooses for itself.
    """

    def __init__(self, source: ProbeSource, device: str) -> None:
        self._loss: Loss = _FunctionLoss(source.function) if source.function else CausalLmLoss(source, device)

    def evaluate(self, request: ProbeRequest) -> ProbeAnswer:
        """The loss of one vector."""
        started_s = time.perf_counter()
        try:
            manifest = ModelManifest.from_json(request.manifest_json)
            loss = self._loss(manifest, map_vector(request.vector_path, manifest, torch.float32))
        except SidecastError as error:
            return ProbeAnswer(refusal=str(error), is_hopeless=True)
        except Exception as error:  # of the operator's code, or of a model's
            return ProbeAnswer(refusal=f"the probe failed: {type(error).__name__}: {one_line(error)}", is_hopeless=True)
        if not math.isfinite(loss):
            return ProbeAnswer(refusal=f"the loss is {loss}")
        return ProbeAnswer(loss=loss, probe_s=time.perf_counter() - started_s)


class ProbeActor:
    """Evaluates in a process of its own, which may be ended without any nowcast's being lost."""

    def __init__(self, config: ServiceConfig) -> None:
        assert config.probe is not None
        # Nobody waits for a loss: on a host that is busy, everything else goes before.
        os.nice(NICENESS)
        torch.set_num_threads(config.engine_threads)
        source = read_source(config.probe, config.probe_tokenizer)
        self._probing = Probing(source, "cuda" if config.probe_gpus else "cpu")

    def evaluate(self, request: ProbeRequest) -> ProbeAnswer:
        return self._probing.evaluate(request)


class _FunctionLoss:
    """The operator's function of weights by name and the model's configuration.

    Args:
        function: ``module:function``, loaded when it is called first.
    """

    def __init__(self, function: str) -> None:
        self._name = function
        self._function: Callable[..., Any] | None = None

    def __call__(self, manifest: ModelManifest, vector_P: Tensor) -> float:
        if self._function is None:
            module, _, name = self._name.partition(":")
            self._function = getattr(importlib.import_module(module), name)
        tensors = {
            spec.fqn: vector_P[manifest.offsets[spec.fqn] :][: spec.numel].view(spec.shape)
            for spec in manifest.parameters
        }
        loss = self._function(tensors, dict(manifest.config))
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ConfigError(f"{self._name} gave a tensor of shape {tuple(loss.shape)}; allowed: one number")
        if isinstance(loss, bool) or not isinstance(loss, int | float | Tensor):
            raise ConfigError(f"{self._name} gave {shown(loss)}; allowed: one number")
        return float(loss)
