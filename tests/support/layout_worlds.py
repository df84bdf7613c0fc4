"""Small models as each kind of optimizer would hold them on every rank of a run, made by hand and in one process.

What DeepSpeed's optimizers would have made is laid out here from its description, so that layouts are compared with
something that knows nothing of them. Padding is filled with ``PADDING``, which no weight is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sidecast.protos.shards import ShardSpec
from sidecast.trainer.partitions import Layout
from sidecast.trainer.partitions.layouts.replicated import ReplicatedLayout
from sidecast.trainer.partitions.layouts.sharded import ShardedLayout, Split
from sidecast.trainer.partitions.layouts.windowed import Window, WindowedLayout
from sidecast.trainer.partitions.optimizer_state import OptimizerState
from sidecast.trainer.partitions.plain import plain_layout
from sidecast.trainer.partitions.trainable import trainable_parameters

PADDING = -77.0
ALIGNMENT = 4
SHAPES = {
    # With neither two nor three ranks does anything come out even.
    "usual": {"wide": (3, 5), "deep": (7,), "one": (1,)},
    # Fewer elements than ranks.
    "tiny": {"wide": (1,), "deep": (2,)},
}


class Model(nn.Module):
    """Trained parameters, one of them under two names, and a frozen one."""

    def __init__(self, kind: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, values in true_weights(kind).items():
            self.register_parameter(name, nn.Parameter(values.to(dtype)))
        self.tied = self.wide
        self.frozen = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)

    @property
    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]


def true_weights(kind: str) -> dict[str, Tensor]:
    """What the masters hold at first, in the order of ``named_parameters``."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES[kind].items()}


@dataclass(kw_only=True)
class Held:
    """What one rank holds, and how to look into it without the code under test.

    Attributes:
        map_layout: As a backend gives it to a ``Partition``.
        optimizer: That updates the masters.
        locals: The memory of the masters as they are now, padding included.
        published: What the model's own weights are, of a shard that this rank owns.
        replace_master: Puts an equal tensor in the place of the first master.
    """

    map_layout: Callable[[], Layout]
    optimizer: torch.optim.Optimizer
    locals: Callable[[], list[Tensor]]
    published: Callable[[ShardSpec], Tensor]
    replace_master: Callable[[], None]

    def step(self) -> None:
        """Makes one optimizer step, which changes every master that holds anything, and its state."""
        for group in self.optimizer.param_groups:
            for master in group["params"]:
                master.grad = torch.ones_like(master)
        self.optimizer.step()


Make = Callable[[str, int], list[Held]]


@dataclass
class _Masters:
    """A backend's list of plain master tensors, and the optimizer that updates them."""

    tensors: list[Tensor]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.tensors, lr=0.1)

    def replace_first(self) -> None:
        old = self.tensors[0]
        new = nn.Parameter(old.detach().clone())
        self.tensors[0] = new
        swap(self.optimizer, old, new)

    def held(self, map_layout: Callable[[], Layout], published: Callable[[ShardSpec], Tensor]) -> Held:
        return Held(
            map_layout=map_layout,
            optimizer=self.optimizer,
            locals=lambda: [master.detach() for master in self.tensors],
            published=published,
            replace_master=self.replace_first,
        )


def swap(optimizer: torch.optim.Optimizer, old: Tensor, new: Tensor) -> None:
    """Lets an optimizer train another tensor, as if it had always done so."""
    for group in optimizer.param_groups:
        group["params"] = [new if each is old else each for each in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(old)


def _of_parameters(parameters: Sequence[Tensor]) -> Callable[[ShardSpec], Tensor]:
    return lambda shard: parameters[shard.parameter].detach().view(-1)[shard.start : shard.stop]


def plain(kind: str, world_size: int) -> list[Held]:
    """A torch optimizer of fp32 parameters, as one process or DDP's replicas."""

    def held(rank: int) -> Held:
        model = Model(kind)
        optimizer = torch.optim.AdamW(model.trained, lr=0.1)

        def replace() -> None:
            old = model.wide
            model.wide = model.tied = nn.Parameter(old.detach().clone())
            swap(optimizer, old, model.wide)

        return Held(
            map_layout=lambda: plain_layout(model, optimizer, rank=rank, world_size=world_size),
            optimizer=optimizer,
            locals=lambda: [parameter.detach() for parameter in model.trained],
            published=lambda shard: _of_parameters(model.trained)(shard),
            replace_master=replace,
        )

    return [held(rank) for rank in range(world_size)]


def replicated(kind: str, world_size: int) -> list[Held]:
    """Stage 0 with half-precision weights: flat masters of whole groups on every rank."""

    def held(rank: int) -> Held:
        model = Model(kind, torch.bfloat16)
        groups = [model.trained[1:], model.trained[:1]]
        true = list(true_weights(kind).values())
        flats = [torch.cat([each.view(-1) for each in group]) for group in (true[1:], true[:1])]
        masters = _Masters([nn.Parameter(flat) for flat in flats])
        trainable = trainable_parameters(model, model.trained)

        def map_layout() -> Layout:
            state = OptimizerState([masters.optimizer], None)
            return ReplicatedLayout(trainable, state, groups, lambda: masters.tensors, rank=rank, world_size=world_size)

        return masters.held(map_layout, _of_parameters(model.trained))

    return [held(rank) for rank in range(world_size)]


def windowed(kind: str, world_size: int) -> list[Held]:
    """Stages 1 and 2: aligned parameters, in another order than the model's, and the end padded."""

    def held(rank: int) -> Held:
        model = Model(kind, torch.bfloat16)
        windows: list[Window] = []
        # Two groups: one of several parameters, the last one first, and one of the first parameter.
        for group in (model.trained[:0:-1], model.trained[:1]):
            flat, full = _flattened(kind, model, group, world_size)
            numel = flat.numel() // world_size
            master = nn.Parameter(full[rank * numel : (rank + 1) * numel].clone())
            windows.append(Window(group, flat, master, rank))
        masters = _Masters([window.master for window in windows])
        trainable = trainable_parameters(model, model.trained)

        def now() -> list[Window]:
            return [
                Window(window.parameters, window.flat, master, rank)
                for window, master in zip(windows, masters.tensors, strict=True)
            ]

        def publish() -> None:
            # The others' windows come from them.
            for window in now():
                numel = window.master.numel()
                window.flat[rank * numel : (rank + 1) * numel].copy_(window.master.detach())

        def map_layout() -> Layout:
            return WindowedLayout(trainable, OptimizerState([masters.optimizer], None), now, publish)

        return masters.held(map_layout, _of_parameters(model.trained))

    return [held(rank) for rank in range(world_size)]


def _flattened(kind: str, model: Model, group: list[nn.Parameter], world_size: int) -> tuple[Tensor, Tensor]:
    """Makes parameters views of one padded flat tensor; gives it, and the same in full precision."""
    true = list(true_weights(kind).values())
    position = {id(parameter): index for index, parameter in enumerate(model.trained)}
    end = sum(-(-parameter.numel() // ALIGNMENT) * ALIGNMENT for parameter in group)
    full = torch.full((-(-end // world_size) * world_size,), PADDING)
    flat = full.to(torch.bfloat16)
    offset = 0
    for parameter in group:
        place = slice(offset, offset + parameter.numel())
        full[place] = true[position[id(parameter)]].view(-1)
        flat[place] = parameter.detach().view(-1)
        parameter.data = flat[place].view(parameter.shape)
        offset += -(-parameter.numel() // ALIGNMENT) * ALIGNMENT
    return flat, full


def sharded(kind: str, world_size: int) -> list[Held]:
    """Stage 3: every parameter split evenly and padded, the model's own emptied; two sub-groups."""

    def held(rank: int) -> Held:
        model = Model(kind, torch.bfloat16)
        true = list(true_weights(kind).values())
        splits: list[Split] = []
        # This rank's pieces in the precision of the model, and in full.
        lows: list[Tensor] = []
        pieces: list[Tensor] = []
        for parameter, values in zip(model.trained, true, strict=True):
            numel = -(-parameter.numel() // world_size)
            piece = torch.full((numel,), PADDING)
            held_values = values.view(-1)[rank * numel : (rank + 1) * numel]
            piece[: held_values.numel()] = held_values
            splits.append(Split(parameter, numel, rank))
            lows.append(piece.to(torch.bfloat16))
            pieces.append(piece)
            stage3: Any = parameter
            stage3.ds_shape = parameter.shape
            parameter.data = torch.empty(0, dtype=torch.bfloat16)
        sub_groups = [splits[:1], splits[1:]]
        masters = _Masters([nn.Parameter(pieces[0].clone()), nn.Parameter(torch.cat(pieces[1:]))])
        trainable = trainable_parameters(model, model.trained)

        def publish() -> None:
            flat = torch.cat([master.detach() for master in masters.tensors])
            for low, piece in zip(lows, flat.split([split.numel for split in splits]), strict=True):
                low.copy_(piece)

        def map_layout() -> Layout:
            state = OptimizerState([masters.optimizer], None)
            return ShardedLayout(trainable, state, sub_groups, lambda: masters.tensors, publish)

        def published(shard: ShardSpec) -> Tensor:
            begin = rank * splits[shard.parameter].numel
            return lows[shard.parameter][shard.start - begin : shard.stop - begin]

        return masters.held(map_layout, published)

    return [held(rank) for rank in range(world_size)]


WORLDS: dict[str, Make] = {"plain": plain, "replicated": replicated, "windowed": windowed, "sharded": sharded}
