"""A hook of one rank with nothing real around it: a fake partition, a fake courier, a vote of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from sidecast.protos.shards import ShardSpec
from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.messenger import ForHook, FromHook
from sidecast.trainer.hook.slots import Slot, SlotState, has_free, take_free
from sidecast.trainer.hook.vote import ANOTHER_RANK, NO_VALUES, Ballot, Decision, decide
from sidecast.trainer.pipe.buffers import SharedBuffer
from sidecast.trainer.pipe.messages import Failed, Prediction, Snapshot

PREDICTION = Prediction(
    session_id="now",
    version=1,
    base_step=20,
    epoch=0,
    horizon_intervals=5,
    digest=7,
    relative_norm=0.1,
    nowcast_s=0.5,
    num_bytes=8,
)


class FakePartition:
    """Two weights."""

    upload_shards = owned_shards = (ShardSpec(0, 0, 2),)
    parameters = ()
    has_replicas = False
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.weights = torch.zeros(2)
        self.rates: tuple[float, ...] = (0.5,)
        self.moments: list[Any] = []

    def learning_rates(self) -> tuple[float, ...]:
        return self.rates

    def require_current(self) -> None:
        pass

    def read(self, out: torch.Tensor, stream: object = None) -> None:
        out.copy_(self.weights)

    def rollback_bytes(self) -> int:
        return 64

    def scale_momentum(self, factor: float) -> None:
        self.moments.append(factor)

    def require_scalable(self) -> None:
        pass

    def require_resettable(self) -> None:
        pass

    def reset_moments(self) -> None:
        self.moments.append("reset")

    def read_owned(self, out: torch.Tensor) -> None:
        out.copy_(self.weights)

    def apply(self, delta: torch.Tensor, weight: float, *, base: torch.Tensor | None = None) -> None:
        self.weights = (self.weights if base is None else base) + weight * delta


class FakeCourier:
    """Says what a test wants said, and remembers how long it was waited for.

    Attributes:
        after_post: State of a slot once it is posted; FREE is a courier that sends in no time.
    """

    after_post = SlotState.FREE
    num_deaths = 0
    session_id = "now"

    def __init__(self, num_slots: int = 1) -> None:
        self.slots: Sequence[Slot] = [Slot(index, SharedBuffer("slot", 8)) for index in range(num_slots)]
        self.prediction = SharedBuffer("prediction", 8)
        torch.frombuffer(self.prediction.map, dtype=torch.float32).fill_(1.0)
        self.held: Prediction | None = None
        self.unread: list[ForHook] = []
        self.waited_s: list[float] = []
        self.posted: list[FromHook] = []
        self.num_released = 0

    def receive(self, timeout_s: float = 0.0) -> Iterator[ForHook]:
        if timeout_s > 0:
            self.waited_s.append(timeout_s)
        unread, self.unread = self.unread, []
        for message in unread:
            if isinstance(message, Prediction):
                self.held = message
            yield message

    @property
    def has_free_slot(self) -> bool:
        return has_free(self.slots)

    def take_slot(self) -> Slot | None:
        return take_free(self.slots)

    def post(self, message: FromHook, *, may_be_lost: bool = False) -> bool:
        self.posted.append(message)
        if isinstance(message, Snapshot):
            self.slots[message.slot].state = self.after_post
            # So that a wait for the prediction ends.
            self.unread.append(Failed(step=message.step, reason="none today"))
        return True

    def release_prediction(self, record: Mapping[str, Any] | None) -> None:
        self.held = None
        self.num_released += 1


class OneVoter:
    """Everybody agrees with the only rank."""

    left_rank: int | None = None

    def __init__(self) -> None:
        self.ballot: Ballot | None = None

    @property
    def is_open(self) -> bool:
        return self.ballot is not None

    def launch(self, ballot: Ballot) -> None:
        self.ballot = ballot

    def read(self) -> Decision:
        assert self.ballot is not None
        ballot, self.ballot = self.ballot, None
        return decide([ballot])

    def peek(self) -> Decision:
        assert self.ballot is not None
        return decide([self.ballot])

    def confirm(self, is_ready: bool, values: tuple[int, int] = NO_VALUES) -> str:
        return "" if is_ready else ANOTHER_RANK


def new_hook(
    courier: FakeCourier, partition: FakePartition, step: int, *, is_linked: bool = True, **settings: Any
) -> NowcastHook:
    config = NowcasterConfig(
        context_len=2, period_steps=20, vote_interval_steps=1, vote_lag_steps=0, rollback="off", **settings
    )
    return hook_with(config, courier, partition, step, is_linked=is_linked)


def hook_with(
    config: NowcasterConfig, courier: FakeCourier, partition: FakePartition, step: int, *, is_linked: bool = True
) -> NowcastHook:
    return NowcastHook(
        config,
        partition,  # type: ignore[arg-type]
        courier,  # type: ignore[arg-type]
        OneVoter(),  # type: ignore[arg-type]
        step=step,
        run_id="run",
        is_linked=is_linked,
    )
