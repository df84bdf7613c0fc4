"""Optimizers of well-kept libraries, one instance for each member, on views of the members' vectors.

Shape suffixes: M members, P elements of the parameter vector.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sidecast.errors import ConfigError
from sidecast.evaluation.settings import OptimizerSettings
from sidecast.manifest import ModelManifest

Named = list[tuple[str, nn.Parameter]]
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "wpe.weight")


class RowOptimizers:
    """Implements ``GroupOptimizer`` with one library optimizer for each member.

    Args:
        settings: Of each member.
        manifest: Which elements are a matrix, for optimizers that care.
        params_MP: What is trained; the optimizers hold views of it.
    """

    def __init__(self, settings: Sequence[OptimizerSettings], manifest: ModelManifest, params_MP: Tensor) -> None:
        self._params_MP = params_MP
        self._named = [_parameters(manifest, row_P) for row_P in params_MP]
        self._optimizers = []
        for each, named in zip(settings, self._named, strict=True):
            try:
                self._optimizers.append(LIBRARY_OPTIMIZERS[each.name](each, named))
            except (TypeError, ValueError, KeyError) as error:
                options = dict(each.options)
                raise ConfigError(f"optimizer {each.name!r} refuses the options {options}: {error}") from error
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self._optimizers]

    def step(self, params_MP: Tensor, grads_MP: Tensor, lr_ratio: float) -> None:
        """See ``GroupOptimizer.step``."""
        assert params_MP.data_ptr() == self._params_MP.data_ptr()
        rows = zip(self._optimizers, self._named, self._peaks, grads_MP, strict=True)
        for optimizer, named, peaks, grads_P in rows:
            position = 0
            for _, parameter in named:
                parameter.grad = grads_P[position : position + parameter.numel()].view_as(parameter)
                position += parameter.numel()
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_ratio
            optimizer.step()

    def read_out(self, params_MP: Tensor) -> Tensor:
        """See ``GroupOptimizer.read_out``: Schedule-Free has weights of its own for that."""
        if not hasattr(self._optimizers[0], "train"):
            return params_MP
        kept_MP = params_MP.clone()
        for optimizer in self._optimizers:
            optimizer.eval()
        read_MP = params_MP.clone()
        for optimizer in self._optimizers:
            optimizer.train()
        # Its way there and back is exact only up to round-off; looking must not change a run.
        params_MP.copy_(kept_MP)
        return read_MP

    def state(self) -> dict[str, Any]:
        """See ``GroupOptimizer.state``."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self._optimizers]}

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``GroupOptimizer.load``."""
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def _parameters(manifest: ModelManifest, row_P: Tensor) -> Named:
    def cut() -> Iterator[tuple[str, nn.Parameter]]:
        for spec in manifest.parameters:
            start = manifest.offsets[spec.fqn]
            yield spec.fqn, nn.Parameter(row_P[start : start + spec.numel].view(spec.shape))

    return list(cut())


def _library(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"an optimizer needs the package {package!r}: pip install sidecast[evaluation]") from error


def _schedule_free(settings: OptimizerSettings, named: Named) -> Any:
    optimizer = _library("schedulefree", "schedulefree").AdamWScheduleFree(
        [parameter for _, parameter in named],
        lr=settings.lr,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        foreach=False,
        **settings.options,
    )
    optimizer.train()
    return optimizer


def _ademamix(settings: OptimizerSettings, named: Named) -> Any:
    options = {"b3": 0.998, "alpha": 5.0, **settings.options}
    return _library("pytorch_optimizer", "pytorch-optimizer").AdEMAMix(
        [parameter for _, parameter in named],
        lr=settings.lr,
        betas=(settings.b1, settings.b2, options.pop("b3")),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        weight_decouple=True,
        foreach=False,
        **options,
    )


def _muon(settings: OptimizerSettings, named: Named) -> Any:
    """Muon for the matrices between the embeddings and AdamW, at a lower rate, for everything else."""
    options = {"momentum": 0.95, "adamw_lr_ratio": 0.3, **settings.options}
    is_matrix = [parameter.ndim == 2 and not name.endswith(_EMBEDDINGS) for name, parameter in named]
    matrices = [parameter for (_, parameter), yes in zip(named, is_matrix, strict=True) if yes]
    others = [parameter for (_, parameter), yes in zip(named, is_matrix, strict=True) if not yes]
    common = {"weight_decay": settings.weight_decay}
    adamw = {
        "lr": settings.lr * options.pop("adamw_lr_ratio"),
        "betas": (settings.b1, settings.b2),
        "eps": settings.eps,
    }
    groups = [
        {"params": matrices, "use_muon": True, "lr": settings.lr, "momentum": options.pop("momentum"), **common},
        {"params": others, "use_muon": False, **adamw, **common},
    ]
    return _library("pytorch_optimizer", "pytorch-optimizer").Muon(groups, foreach=False, **options)


def _lookahead(settings: OptimizerSettings, named: Named) -> Any:
    adamw = torch.optim.AdamW(
        [parameter for _, parameter in named],
        lr=settings.lr,
        betas=(settings.b1, settings.b2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    return _library("pytorch_optimizer", "pytorch-optimizer").Lookahead(adamw, **settings.options)


LIBRARY_OPTIMIZERS: Mapping[str, Callable[[OptimizerSettings, Named], Any]] = {
    "schedule-free": _schedule_free,
    "ademamix": _ademamix,
    "muon": _muon,
    "lookahead": _lookahead,
}
