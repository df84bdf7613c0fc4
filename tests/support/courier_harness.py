"""What a training rank does with its courier, for tests."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sidecast.manifest import ModelManifest
from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.pipe.messages import Message

WAIT_S = 30.0


def session(session_id: str, run_id: str = "run", **changes: Any) -> dict[str, Any]:
    """What the trainer says of a session."""
    plain = {"session_id": session_id, "run_id": run_id, "resumed": False, "resume_step": 0, "resume_epoch": 0}
    return plain | changes


def hello(
    endpoint: str,
    manifest: ModelManifest,
    shards: Sequence[tuple[int, int, int]],
    *,
    first: dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
    context_len: int = 2,
    interval_steps: int = 10,
    record_dir: Path | None = None,
    connect_s: float = 1.0,
    wire_dtype: str = "fp32",
    shared_memory: str = "off",
    **client: Any,
) -> dict[str, Any]:
    """A rank's first message to its courier."""
    fields = {
        "world_size": world_size,
        "schema_hash": manifest.schema_hash,
        "context_len": context_len,
        "snapshot_interval_steps": interval_steps,
        "period_steps": context_len * interval_steps,
        "max_steps": 0,
        "horizon": {"schedule": "", "max_intervals": 0, "power": 2.0},
        "predictor": "fake",
        "predictor_options_json": "{}",
        "max_relative_norm": 10.0,
        "aliases": dict(manifest.aliases),
        "wire_dtype": "BF16" if wire_dtype == "bf16_delta" else "FP32",
    }
    parameters = [[spec.fqn, list(spec.shape)] for spec in manifest.parameters]
    return {
        "wire_dtype": wire_dtype,
        "shared_memory": shared_memory,
        "rank": rank,
        "stage": "2",
        "run_name": "test",
        "client": {
            "endpoint": endpoint,
            "token_file": None,
            "tls_ca": None,
            "connect_s": connect_s,
            "chunk_s": 20.0,
            "stream_s": 40.0,
            **client,
        },
        "metrics_port": None,
        "record_dir": None if record_dir is None else str(record_dir),
        "session": first,
        "opening": {"fields": fields, "parameters": parameters, "config_json": '{"model_type": "toy"}'},
        "upload_shards": [list(shard) for shard in shards],
        "fetch_shards": [list(shard) for shard in shards],
    }


def start_courier(
    greeting: dict[str, Any], kind: type[CourierHandle] = CourierHandle, num_slots: int = 2
) -> CourierHandle:
    """A courier of one rank whose upload and fetch ranges are the same."""
    num_bytes = 4 * sum(stop - start for _, start, stop in greeting["upload_shards"])
    courier = kind(greeting, upload_bytes=num_bytes, fetch_bytes=num_bytes, num_slots=num_slots)
    courier.start()
    return courier


def until(courier: CourierHandle, kind: str, seen: list[Message] | None = None) -> Message:
    """The courier's next message of a kind; others are kept in ``seen``."""
    deadline_s = time.monotonic() + WAIT_S
    others: list[Message] = [] if seen is None else seen
    while (left_s := deadline_s - time.monotonic()) > 0:
        for message in courier.receive(left_s):
            if message["type"] == kind:
                return message
            others.append(message)
    raise AssertionError(f"no {kind!r} from the courier, but {others}")


class PacedCourier(CourierHandle):
    """Brings predictions at the steps that a test wants them at, and not before.

    Attributes:
        is_pacing: Withhold predictions until they are waited for.
        wait_for: Kind of message that the next ``receive`` is to wait for.
    """

    is_pacing = True
    wait_for = ""

    def receive(self, timeout_s: float = 0.0) -> Iterator[Message]:
        self._withheld: list[Message] = getattr(self, "_withheld", [])
        deadline_s = time.monotonic() + WAIT_S
        while True:
            arrived = [*self._withheld, *super().receive(timeout_s)]
            self._withheld = []
            for message in arrived:
                if message["type"] == "prediction" and self.is_pacing and self.wait_for != "prediction":
                    self._withheld.append(message)
                    continue
                if message["type"] == self.wait_for:
                    self.wait_for = ""
                yield message
            if not self.wait_for:
                return
            assert time.monotonic() < deadline_s, f"no {self.wait_for!r} from the courier"
            timeout_s = 1.0
