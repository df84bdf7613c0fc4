"""The tile loops of a nowcast in compiled code, for CPUs; torch's operators stand in wherever it cannot run.

Shape suffixes: D hidden, X edge features, S source nodes, T target nodes, F kernel elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.predictors.nino.fusion import Affine
from sidecast.predictors.nino.kernels import CpuKernels, Kernels, Layer
from sidecast.predictors.nino.loops import LOOPS, TORCH_LOOPS, CompiledLayer, Loops, compiled_loops, load_problem

AUTO = "auto"
"""The setting that leaves a choice to what the processor has."""
CPU_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MIN_SOURCES = 4
"""The compiled loops work on six sources of a target at once; with few of them (pairs have one), torch is faster."""


def check_loops(precision: str, loops: str) -> None:
    """Raises ConfigError unless there are such loops, and they multiply in this precision."""
    if loops in (AUTO, TORCH_LOOPS):
        return
    if loops not in LOOPS:
        raise ConfigError(f"loops is {loops!r}; allowed: {', '.join((AUTO, TORCH_LOOPS, *LOOPS))}")
    if precision != AUTO and CPU_DTYPES[precision] != LOOPS[loops].dtype:
        fitting = next(name for name, dtype in CPU_DTYPES.items() if dtype == LOOPS[loops].dtype)
        raise ConfigError(
            f"loops is {loops!r}, which multiply in {fitting}; precision is {precision!r}; "
            f"allowed with these loops: {fitting}, {AUTO}"
        )


def cpu_kernels(precision: str, loops: str, dim: int) -> Kernels:
    """The tile loops for a CPU.

    Args:
        precision: Of the products, or ``auto`` for that of the fastest loops.
        loops: Which to take, or ``auto`` for the fastest ones; torch's operators where no compiled ones can.
        dim: D, the hidden width.

    Raises:
        ConfigError: The loops are not installed, this processor cannot run them, or they do not know the width.
    """
    here = compiled_loops()
    if loops in LOOPS:
        if loops not in here:
            problem = None if here else load_problem()
            if problem is not None:
                raise ConfigError(
                    f"loops is {loops!r}, and compiled loops are not to be had ({problem}); allowed here: "
                    f"{AUTO}, {TORCH_LOOPS}"
                )
            raise ConfigError(
                f"loops is {loops!r}, which need {LOOPS[loops].needs}; "
                f"here there are: {', '.join((*here, TORCH_LOOPS))}"
            )
        if dim % LOOPS[loops].dim_step:
            raise ConfigError(
                f"loops is {loops!r}, which need a hidden width that is a multiple of {LOOPS[loops].dim_step}; "
                f"that of these weights is {dim}"
            )
        return CompiledKernels(here[loops])
    if loops == AUTO:
        for found in here.values():
            if precision in (AUTO, _precision(found.kind.dtype)) and dim % found.kind.dim_step == 0:
                return CompiledKernels(found)
    # Torch's bf16 operators gain nothing over its fp32 ones.
    return CpuKernels(CPU_DTYPES["fp32" if precision == AUTO else precision])


def _precision(dtype: torch.dtype) -> str:
    return next(name for name, other in CPU_DTYPES.items() if other == dtype)


class CompiledKernels:
    """Tiles in compiled code. Python's lock is free meanwhile, so that threads do not wait for each other.

    Args:
        loops: The loops. Everything but their D x D products is fp32; bf16 products go with a SiLU whose error is
            2^-13.
    """

    def __init__(self, loops: Loops) -> None:
        self.loops = loops
        self._torch_kernels = CpuKernels(loops.kind.dtype)
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}

    def message_sums(
        self, features_XTS: Tensor, layers: Sequence[Layer], scale_DD: Tensor, gain_SD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See ``Kernels.message_sums``."""
        dim = scale_DD.shape[0]
        if not self._can(features_XTS, dim):
            return self._torch_kernels.message_sums(features_XTS, layers, scale_DD, gain_SD)
        call = self._call(features_XTS, layers)
        hidden_TD, gained_TD = torch.zeros(2, features_XTS.shape[1], dim)
        scale, gain = call.address(self._pack(scale_DD)), call.address(gain_SD)
        self.loops.message_sums(*call.part, scale, gain, call.address(hidden_TD), call.address(gained_TD), call.scratch)
        return hidden_TD, gained_TD

    def changes(self, features_XTS: Tensor, layers: Sequence[Layer], output: Affine) -> Tensor:
        """See ``Kernels.changes``."""
        dim, num_elements = output.weight.shape
        if not self._can(features_XTS, dim):
            return self._torch_kernels.changes(features_XTS, layers, output)
        call = self._call(features_XTS, layers)
        change_TSF = torch.empty(*features_XTS.shape[1:], num_elements)
        weight, bias = call.address(output.weight.T), call.address(output.bias)
        self.loops.changes(*call.part, weight, bias, num_elements, call.address(change_TSF), call.scratch)
        return change_TSF

    def _can(self, features_XTS: Tensor, dim: int) -> bool:
        return features_XTS.shape[2] >= _MIN_SOURCES and dim % self.loops.kind.dim_step == 0

    def _call(self, features_XTS: Tensor, layers: Sequence[Layer]) -> _Call:
        first, *later = layers
        weights = [self.loops.kind.pack(first.weight, True), *(self._pack(layer.weight) for layer in later)]
        return _Call(self.loops, features_XTS, layers, weights)

    def _pack(self, weight_DD: Tensor) -> Tensor:
        """A weight as the loops read it: packed once, because the same ones come with every part."""
        known = self._packed.get(id(weight_DD))
        if known is None:
            # With the weight itself, so that no other one can take its identity.
            known = self._packed[id(weight_DD)] = weight_DD, self.loops.kind.pack(weight_DD, False)
        return known[1]


class _Call:
    """Arguments of one call, and what keeps the memory that they point to.

    Attributes:
        part: The arguments that both functions begin with.
        scratch: Address of scratch memory.
    """

    def __init__(
        self, loops: Loops, features_XTS: Tensor, layers: Sequence[Layer], packed_weights: Sequence[Tensor]
    ) -> None:
        self._kept: list[Tensor] = []
        dim = layers[0].weight.shape[1]
        compiled = (CompiledLayer * len(layers))()
        for slot, layer, weight in zip(compiled, layers, packed_weights, strict=True):
            slot.weight = self.address(weight)
            slot.source_SD = None if layer.source_SD is None else self.address(layer.source_SD)
            slot.target_TD = self.address(layer.target_TD)
            slot.target_stride = 0 if len(layer.target_TD) == 1 else dim
        self.part = (self.address(features_XTS), *features_XTS.shape, compiled, len(layers), dim)
        self.scratch = self.address(torch.empty(loops.scratch_bytes(dim), dtype=torch.uint8))

    def address(self, tensor: Tensor) -> int:
        """Where the elements are; kept there until this call is gone."""
        assert tensor.dtype in (torch.float32, torch.bfloat16, torch.uint8)
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()
