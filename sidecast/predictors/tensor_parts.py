"""Parts for predictors that need no graph: runs of consecutive elements of one tensor, in any model.

Shape suffixes: C context, N elements of one part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from sidecast.manifest import ModelManifest

MAX_ELEMENTS = 1 << 18
"""Elements of one part: 1 MiB of each state in fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementRange:
    """Consecutive elements of one tensor.

    Attributes:
        fqn: The parameter.
        start: Its first element that is in this part, counted from the parameter's own first.
        num_scalars: N.
    """

    fqn: str
    start: int
    num_scalars: int

    def read(self, states: Sequence[Tensor], parameter_start: int) -> list[Tensor]:
        """The elements in each of C parameter vectors in which the parameter begins there, C views of N elements."""
        return [self._of(state, parameter_start) for state in states]

    def write(self, values_N: Tensor, out: Tensor, parameter_start: int) -> None:
        """Writes one value for each element into a parameter vector."""
        self._of(out, parameter_start).copy_(values_N)

    def _of(self, vector: Tensor, parameter_start: int) -> Tensor:
        return vector.narrow(0, parameter_start + self.start, self.num_scalars)


def split_tensors(manifest: ModelManifest, max_elements: int | None = None) -> list[ElementRange]:
    """Divides every tensor of a model into parts of bounded size (``MAX_ELEMENTS`` unless told)."""
    step = MAX_ELEMENTS if max_elements is None else max_elements
    return [
        ElementRange(fqn=spec.fqn, start=start, num_scalars=min(step, spec.numel - start))
        for spec in manifest.parameters
        for start in range(0, spec.numel, step)
    ]
