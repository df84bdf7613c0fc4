"""Models as functions of many parameter vectors at once.

Shape suffixes: M members of a farm, P elements of the parameter vector, B sequences, L tokens of a sequence,
N = B * L tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from sidecast.manifest import ModelManifest


@dataclass(frozen=True)
class Weight:
    """Parameters that lie side by side in the parameter vector and are used as one tensor.

    Attributes:
        name: What the model calls it.
        start: Where it begins in the parameter vector.
        shape: As it is used.
    """

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Where it ends."""
        return self.start + prod(self.shape)

    def view(self, vectors_MP: Tensor) -> Tensor:
        """It in each of M parameter vectors, (M, *shape), without a copy."""
        return vectors_MP[:, self.start : self.stop].view(len(vectors_MP), *self.shape)


class Model(Protocol):
    """What the farm needs of a model.

    Attributes:
        manifest: Names, shapes and order of the parameters.
        weights: Every element of the parameter vector once, in order.
    """

    @property
    def manifest(self) -> ModelManifest: ...

    @property
    def weights(self) -> Sequence[Weight]: ...

    def initial(self, seed: int) -> Tensor:
        """Random initial weights (P,), decided by the seed alone."""
        ...

    def losses(self, weights: Mapping[str, Tensor], tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """The mean cross-entropy of each of M members on the same tokens, (M,).

        Args:
            weights: Each weight of all members, (M, *shape), by name.
            tokens_BL: Inputs, int64.
            targets_BL: What follows each of them, int64.
        """
        ...


def views(model: Model, vectors_MP: Tensor) -> dict[str, Tensor]:
    """Each weight of a model in each of M parameter vectors, by name."""
    return {weight.name: weight.view(vectors_MP) for weight in model.weights}


def join(manifest: ModelManifest, name: str, fqns: Sequence[str], shape: tuple[int, ...]) -> Weight:
    """One weight of parameters that follow each other in the manifest."""
    start = manifest.offsets[fqns[0]]
    assert start + prod(shape) == manifest.offsets[fqns[-1]] + manifest.spec(fqns[-1]).numel
    return Weight(name, start, shape)


def embed(embedding_MVD: Tensor, tokens_BL: Tensor) -> Tensor:
    """The embeddings of the same tokens for every member, (M, N, D)."""
    num_members, vocab_size, width = embedding_MVD.shape
    first_M1 = torch.arange(num_members, device=tokens_BL.device)[:, None] * vocab_size
    rows_MN = first_M1 + tokens_BL.reshape(1, -1)
    # One table of all members: the gradient of `embedding` is a quick loop, that of indexing a member's table is not.
    return torch.nn.functional.embedding(rows_MN, embedding_MVD.reshape(-1, width))


def cross_entropies(logits_MNV: Tensor, targets_BL: Tensor) -> Tensor:
    """The mean cross-entropy of each member, (M,)."""
    num_members, num_tokens, _ = logits_MNV.shape
    targets_MN1 = targets_BL.reshape(1, num_tokens, 1).expand(num_members, -1, -1)
    # Not float(): a reference in double precision stays one.
    logits = logits_MNV.float() if logits_MNV.dtype in (torch.bfloat16, torch.float16) else logits_MNV
    chosen_MN = logits.gather(-1, targets_MN1)[..., 0]
    return (logits.logsumexp(-1) - chosen_MN).mean(-1)
