"""What a training rank does with its courier, for tests."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from sidecast.manifest import ModelManifest
from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.hook.messenger import ForHook
from sidecast.trainer.pipe.messages import (
    ClientSettings,
    CourierSettings,
    HorizonSettings,
    Opening,
    Prediction,
    Session,
    Shard,
)
from tests.support.limits import HANG_S

SECRET = "0123456789abcdef"
M = TypeVar("M", bound=ForHook)


def session(session_id: str, run_id: str = "run", resume_step: int | None = None, resume_epoch: int = 0) -> Session:
    """What the trainer says of a session; one with a step to resume from is resumed."""
    return Session(
        session_id=session_id,
        run_id=run_id,
        resumed=resume_step is not None,
        resume_step=resume_step or 0,
        resume_epoch=resume_epoch,
        run_secret=SECRET,
    )


def settings(
    endpoint: str,
    manifest: ModelManifest,
    shards: Sequence[Shard],
    *,
    rank: int = 0,
    world_size: int = 1,
    context_len: int = 2,
    interval_steps: int = 10,
    record_dir: Path | None = None,
    connect_s: float = 1.0,
    wire_dtype: Literal["fp32", "bf16_delta"] = "fp32",
    shared_memory: Literal["auto", "off"] = "off",
    **client: Any,
) -> CourierSettings:
    """What a rank tells its couriers, whose upload and fetch ranges are the same."""
    opening = Opening(
        world_size=world_size,
        schema_hash=manifest.schema_hash,
        context_len=context_len,
        snapshot_interval_steps=interval_steps,
        period_steps=context_len * interval_steps,
        max_steps=0,
        horizon=HorizonSettings(schedule="", max_intervals=0, power=2.0),
        predictor="fake",
        predictor_options_json="{}",
        max_relative_norm=10.0,
        aliases=dict(manifest.aliases),
        parameters=tuple((spec.fqn, tuple(spec.shape)) for spec in manifest.parameters),
        config_json='{"model_type": "toy"}',
    )
    return CourierSettings(
        rank=rank,
        run_name="test",
        stage="2",
        client=ClientSettings(
            endpoint=endpoint,
            token_file=None,
            tls_ca=None,
            connect_s=connect_s,
            chunk_s=20.0,
            stream_s=40.0,
            **client,
        ),
        wire_dtype=wire_dtype,
        shared_memory=shared_memory,
        metrics_port=None,
        record_dir=None if record_dir is None else str(record_dir),
        upload_shards=tuple(shards),
        fetch_shards=tuple(shards),
        opening=opening,
    )


def start_courier(
    of_rank: CourierSettings,
    first: Session | None = None,
    kind: type[CourierHandle] = CourierHandle,
    num_slots: int = 2,
) -> CourierHandle:
    """A courier that begins with session ``s1``, or another one."""
    courier = kind(of_rank, session("s1") if first is None else first, num_slots)
    courier.start()
    return courier


def until(courier: CourierHandle, kind: type[M], seen: list[ForHook] | None = None) -> M:
    """The courier's next message of a kind; others are kept in ``seen``."""
    deadline_s = time.monotonic() + HANG_S
    others: list[ForHook] = [] if seen is None else seen
    while (left_s := deadline_s - time.monotonic()) > 0:
        for message in courier.receive(left_s):
            if isinstance(message, kind):
                return message
            others.append(message)
    raise AssertionError(f"no {kind.__name__} from the courier, but {others}")


class PacedCourier(CourierHandle):
    """Brings predictions at the steps that a test wants them at, and not before.

    Attributes:
        is_pacing: Withhold predictions until they are waited for.
        wait_for: Kind of message that the next ``receive`` is to wait for.
    """

    is_pacing = True
    wait_for: type[ForHook] | None = None

    def receive(self, timeout_s: float = 0.0) -> Iterator[ForHook]:
        self._withheld: list[ForHook] = getattr(self, "_withheld", [])
        deadline_s = time.monotonic() + HANG_S
        while True:
            arrived = [*self._withheld, *super().receive(timeout_s)]
            self._withheld = []
            for message in arrived:
                if isinstance(message, Prediction):
                    is_early = self.is_pacing and self.wait_for is not Prediction
                    # For the hook it is not there yet.
                    self.held = None if is_early else message
                    if is_early:
                        self._withheld.append(message)
                        continue
                if self.wait_for is not None and isinstance(message, self.wait_for):
                    self.wait_for = None
                yield message
            if self.wait_for is None:
                return
            assert time.monotonic() < deadline_s, f"no {self.wait_for.__name__} from the courier"
            timeout_s = 1.0
