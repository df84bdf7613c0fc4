"""The optimizers of a group of members: AdamW for all of them at once, and any other library's one by one.

Shape suffixes: M members, P elements of the parameter vector.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.evaluation.library_optimizers import LIBRARY_OPTIMIZERS, RowOptimizers
from sidecast.evaluation.settings import OptimizerSettings
from sidecast.manifest import ModelManifest

OPTIMIZERS = ("adamw", *LIBRARY_OPTIMIZERS)


class GroupOptimizer(Protocol):
    """Takes the steps of all members of a group."""

    def step(self, params_MP: Tensor, grads_MP: Tensor, lr_ratio: float) -> None:
        """Takes one step; may overwrite the gradients.

        Args:
            params_MP: Changed in place.
            grads_MP: Gradients.
            lr_ratio: The share of its peak learning rate that each member uses.
        """
        ...

    def read_out(self, params_MP: Tensor) -> Tensor:
        """The weights to judge the members by (M, P); for most optimizers those that are trained."""
        ...

    def state(self) -> dict[str, Any]:
        """Tensors and plain values for a checkpoint."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave."""
        ...


def make_optimizer(settings: Sequence[OptimizerSettings], manifest: ModelManifest, params_MP: Tensor) -> GroupOptimizer:
    """The optimizer of a group whose members all use the one of the same name.

    Raises:
        ConfigError: There is none of that name, its package is missing, or it does not know an option.
    """
    name = settings[0].name
    assert all(each.name == name for each in settings)
    if name == "adamw":
        return BatchedAdamW(settings, params_MP)
    if name not in LIBRARY_OPTIMIZERS:
        raise ConfigError(f"optimizer is {name!r}; allowed: {', '.join(OPTIMIZERS)}")
    return RowOptimizers(settings, manifest, params_MP)


class BatchedAdamW:
    """AdamW for M members, each with hyper-parameters of its own; operation for operation that of ``torch.optim``.

    Args:
        settings: Of each member.
        params_MP: Whose shape and device the moments have.

    Raises:
        ConfigError: A member has options; AdamW knows none beyond the settings.
    """

    def __init__(self, settings: Sequence[OptimizerSettings], params_MP: Tensor) -> None:
        for each in settings:
            if each.options:
                raise ConfigError(f"optimizer 'adamw' has no option {next(iter(each.options))!r}; allowed: none")
        self._settings = settings
        self._num_steps = 0
        self._first_MP = torch.zeros_like(params_MP)
        self._second_MP = torch.zeros_like(params_MP)
        self._b1_M1 = self._column([each.b1 for each in settings])
        self._rest1_M1 = self._column([1 - each.b1 for each in settings])
        self._b2_M1 = self._column([each.b2 for each in settings])
        self._rest2_M1 = self._column([1 - each.b2 for each in settings])
        self._eps_M1 = self._column([each.eps for each in settings])

    def step(self, params_MP: Tensor, grads_MP: Tensor, lr_ratio: float) -> None:
        """See ``GroupOptimizer.step``. Scalars are computed in double precision, as ``torch.optim`` does."""
        self._num_steps += 1
        lrs = [each.lr * lr_ratio for each in self._settings]
        pairs = list(zip(lrs, self._settings, strict=True))
        kept_M1 = self._column([1 - lr * each.weight_decay for lr, each in pairs])
        sizes_M1 = self._column([-lr / (1 - each.b1**self._num_steps) for lr, each in pairs])
        roots_M1 = self._column([math.sqrt(1 - each.b2**self._num_steps) for each in self._settings])
        # Member by member where that keeps its vectors in a cache between the operations.
        rows = [slice(row, row + 1) for row in range(len(lrs))] if params_MP.device.type == "cpu" else [slice(None)]
        for row in rows:
            params, grads = params_MP[row], grads_MP[row]
            first, second = self._first_MP[row], self._second_MP[row]
            params.mul_(kept_M1[row])
            first.lerp_(grads, self._rest1_M1[row])
            second.mul_(self._b2_M1[row]).addcmul_(grads * self._rest2_M1[row], grads)
            denominators = torch.sqrt(second, out=grads).div_(roots_M1[row]).add_(self._eps_M1[row])
            params.add_((first * sizes_M1[row]).div_(denominators))

    def read_out(self, params_MP: Tensor) -> Tensor:
        """See ``GroupOptimizer.read_out``."""
        return params_MP

    def state(self) -> dict[str, Any]:
        """See ``GroupOptimizer.state``."""
        return {"num_steps": self._num_steps, "first": self._first_MP, "second": self._second_MP}

    def load(self, state: Mapping[str, Any]) -> None:
        """See ``GroupOptimizer.load``."""
        self._num_steps = int(state["num_steps"])
        self._first_MP.copy_(state["first"])
        self._second_MP.copy_(state["second"])

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self._first_MP)[:, None]


def clip_(grads_MP: Tensor, max_norms: Sequence[float]) -> None:
    """Shortens each member's gradient to its largest allowed norm, 0 for none, as ``clip_grad_norm_`` does."""
    norms_M = torch.linalg.vector_norm(grads_MP, dim=1)
    limits_M = torch.tensor([limit or math.inf for limit in max_norms]).to(norms_M)
    grads_MP.mul_((limits_M / (norms_M + 1e-6)).clamp(max=1.0)[:, None])
