"""A courier process against a real service: transfers, restarts of either, resumes."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sidecast.nowcaster_service.session import Session
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.bf16 import from_bf16, round_to_bf16
from sidecast.protos.codec import ChunkFrame
from sidecast.protos.transport import RUN_SECRET_KEY
from sidecast.trainer.courier.client import NowcastClient
from sidecast.trainer.courier.refusals import UnavailableError
from sidecast.trainer.hook.courier_handle import CourierHandle
from sidecast.trainer.hook.messenger import ForHook
from sidecast.trainer.pipe.apply_log import read_delta, read_log
from sidecast.trainer.pipe.messages import (
    ClientSettings,
    Connected,
    Disconnected,
    Dropped,
    PauseChanged,
    Prediction,
    Report,
    Sent,
    Snapshot,
)
from tests.support.courier_calls import applied, predicted, settled, stage
from tests.support.courier_harness import SECRET, session, settings, start_courier, until
from tests.support.limits import HANG_S
from tests.support.relay import Relay
from tests.support.services.harness import CHUNK_BYTES, MANIFEST, RunningService, chunks, open_request, state

ALL = [(0, 0, 15), (1, 0, 40_000)]
# What another job of the run shows.
SHOWN = ((RUN_SECRET_KEY, SECRET),)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    with RunningService(tmp_path / "service") as running:
        yield running


@pytest.fixture
def courier(service: RunningService, tmp_path: Path) -> Iterator[CourierHandle]:
    handle = start_courier(settings(service.endpoint, MANIFEST, ALL, record_dir=tmp_path / "record"))
    try:
        assert until(handle, Connected).session_id == "s1"
        yield handle
    finally:
        handle.close()


def test_a_window_goes_up_and_its_prediction_comes_down_and_is_recorded(courier: CourierHandle, tmp_path: Path) -> None:
    message = predicted(courier)
    assert (message.version, message.base_step, message.horizon_intervals) == (1, 20, 5)
    expected = (state(2) - state(1)).tobytes()
    assert bytes(courier.prediction.view) == expected
    courier.release_prediction(applied(24))
    courier.log({"action": "rolled_back", "step": 30})
    courier.close()
    entries = read_log(tmp_path / "record", 0)
    assert [(entry["action"], entry["step"]) for entry in entries] == [("applied", 24), ("rolled_back", 30)]
    assert read_delta(tmp_path / "record", entries[0], len(expected)) == expected


def served_series(port: int) -> dict[str, float]:
    """What a courier serves: values by name, with the label that tells series of one name apart."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=HANG_S) as reply:
        text = reply.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    names = ("state", "direction", "run_id")
    return {
        "/".join((item.name, *(item.labels[key] for key in names if key in item.labels))): item.value
        for item in samples
    }


def test_what_a_courier_did_is_served_where_the_rank_has_a_port(
    service: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    courier = start_courier(replace(settings(service.endpoint, MANIFEST, ALL), metrics_port=0))
    try:
        until(courier, Connected)
        predicted(courier)
        (port,) = [int(text.split()[-1]) for text in caplog.messages if "serves metrics on port" in text]
        series = served_series(port)
    finally:
        courier.close()
    num_bytes = 4 * MANIFEST.num_elements
    assert series["sidecast_trainer_uploaded_bytes_total"] == 2 * num_bytes
    assert series["sidecast_trainer_upload_seconds_count"] == 2
    assert series["sidecast_trainer_fetched_bytes_total"] == num_bytes
    assert series["sidecast_trainer_fetch_seconds_count"] == 1
    assert series["sidecast_trainer_snapshots_total/committed"] == 2
    assert series["sidecast_trainer_snapshots_total/unsent"] == 0
    assert series["sidecast_trainer_transfers_resumed_total/upload"] == 0
    assert series["sidecast_trainer_connected"] == 1
    assert series["sidecast_trainer_run_info/run"] == 1


def test_a_run_that_another_job_took_over_is_told_so(service: RunningService, courier: CourierHandle) -> None:
    service.stub.Open(open_request(session_id="s2", run_id="run"), metadata=SHOWN)
    assert "superseded by a later one" in until(courier, Disconnected).reason


def test_a_pause_reaches_the_hook_before_any_prediction_does(service: RunningService, courier: CourierHandle) -> None:
    service.stub.Pause(pb.PauseRequest(run_id="run", is_paused=True), metadata=SHOWN)
    assert until(courier, PauseChanged).is_paused
    courier.new_session(session("s2"))
    assert until(courier, Connected).is_paused
    service.stub.Pause(pb.PauseRequest(run_id="run", is_paused=False), metadata=SHOWN)
    while until(courier, PauseChanged).is_paused:
        pass


def test_a_prediction_is_not_overwritten_before_it_is_released(courier: CourierHandle) -> None:
    predicted(courier)
    before = bytes(courier.prediction.view)
    stage(courier, 3, 30)
    stage(courier, 4, 40)
    seen: list[ForHook] = []
    for _ in range(2):
        until(courier, Sent, seen)
    assert bytes(courier.prediction.view) == before
    courier.release_prediction(None)
    assert until(courier, Prediction).version == 2
    assert bytes(courier.prediction.view) == (state(4) - state(3)).tobytes()


def test_a_restarted_service_is_found_and_the_session_opened_again(tmp_path: Path) -> None:
    with RunningService(tmp_path / "first") as first:
        courier = start_courier(settings(first.endpoint, MANIFEST, ALL))
        until(courier, Connected)
        stage(courier, 1, 10)
        assert until(courier, Sent).reason == ""
        port = first.port
    try:
        until(courier, Disconnected)
        stage(courier, 2, 20)
        assert until(courier, Sent).reason != ""
        with RunningService(tmp_path / "second", port=port) as second:
            until(courier, Connected)
            predicted(courier, epoch=2, first_step=30)
            assert second.store.used_bytes == 3 * 4 * MANIFEST.num_elements
    finally:
        courier.close()


def test_a_restarted_service_goes_on_with_what_the_courier_has_sent(tmp_path: Path) -> None:
    with RunningService(tmp_path) as first:
        courier = start_courier(settings(first.endpoint, MANIFEST, ALL))
        until(courier, Connected)
        stage(courier, 1, 10)
        assert until(courier, Sent).reason == ""
        port = first.port
    try:
        until(courier, Disconnected)
        with RunningService(tmp_path, port=port):
            until(courier, Connected)
            stage(courier, 2, 20)
            message = until(courier, Prediction)
            assert (message.version, message.base_step) == (1, 20)
            assert bytes(courier.prediction.view) == (state(2) - state(1)).tobytes()
    finally:
        courier.close()


def test_a_resume_is_opened_although_nothing_happens_in_the_session_before(
    courier: CourierHandle, service: RunningService
) -> None:
    predicted(courier)
    # Sent before the session changes, with an epoch that the later session must not hear of.
    courier.release_prediction(None)
    courier.post(Report(outcome="rejected", version=1, step=25, epoch=9))
    stage(courier, 5, 40, epoch=9)
    courier.new_session(session("s2", resume_step=10))
    # At once: a session that is still being opened loses no snapshot.
    stage(courier, 6, 30)
    # The one before may just have reached its own session, which is over now.
    while (message := until(courier, Sent)).step != 30:
        pass
    assert message.reason == ""
    stage(courier, 7, 40)
    assert until(courier, Prediction).version == 2
    assert bytes(courier.prediction.view) == (state(7) - state(6)).tobytes()
    assert service.servicer.sessions.get("s2").epoch == 0


def test_a_prediction_that_waits_for_its_vote_is_brought_again_after_a_resume(courier: CourierHandle) -> None:
    predicted(courier)
    expected = bytes(courier.prediction.view)
    courier.prediction.view[:] = bytes(len(expected))
    courier.release_prediction(None)
    courier.new_session(session("s2", resume_step=23))
    message = until(courier, Prediction)
    assert (message.session_id, message.version, message.base_step) == ("s2", 1, 20)
    assert bytes(courier.prediction.view) == expected


def test_changes_travel_in_half_the_bytes_and_both_sides_hold_the_same_state(service: RunningService) -> None:
    of_rank = settings(service.endpoint, MANIFEST, ALL, wire_dtype="bf16_delta", context_len=3)
    courier = start_courier(of_rank)
    try:
        until(courier, Connected)
        start = state(1)
        states = [start, start + 1e-3 * state(2), start + 2e-3 * state(3)]
        held, sent_bytes = states[0], []
        for step, values in zip((10, 20, 30), states, strict=True):
            slot = courier.take_slot()
            assert slot is not None
            slot.buffer.view[:] = values.tobytes()
            courier.post(Snapshot(slot=slot.index, step=step, epoch=0))
            sent_bytes.append(settled(courier).num_bytes)
            held = held + from_bf16(round_to_bf16(values - held))
            vector = service.servicer.sessions.get("s1")._snapshots[step].vector.view
            assert bytes(vector) == held.tobytes()
        # Where nothing is shared, nothing was handed over, not even an empty list.
        assert 0 not in service.servicer.sessions.get("s1")._ranks._shared
        assert sent_bytes == [4 * MANIFEST.num_elements, *[2 * MANIFEST.num_elements] * 2]
        message = until(courier, Prediction)
        assert message.num_bytes == 2 * MANIFEST.num_elements
        expected = from_bf16(round_to_bf16(held - states[0]))
        assert bytes(courier.prediction.view) == expected.tobytes()
    finally:
        courier.close()


def test_changes_since_a_state_that_nobody_holds_are_never_sent(service: RunningService) -> None:
    of_rank = settings(service.endpoint, MANIFEST, ALL, wire_dtype="bf16_delta")
    courier = start_courier(of_rank)
    try:
        until(courier, Connected)
        whole_bytes = 4 * MANIFEST.num_elements

        def sent_bytes(step: int, epoch: int) -> int:
            stage(courier, step, step, epoch)
            return int(settled(courier).num_bytes)

        assert sent_bytes(10, 0) == whole_bytes
        # Another epoch begins: the service forgets the states before it.
        assert sent_bytes(20, 1) == whole_bytes
        assert sent_bytes(30, 1) == whole_bytes // 2
        # The service loses the base, and the courier does not know.
        service.servicer.sessions.get("s1")._snapshots.clear()
        assert sent_bytes(40, 1) == whole_bytes
        assert sent_bytes(50, 1) == whole_bytes // 2
    finally:
        courier.close()


def test_a_service_on_this_host_maps_the_buffers_and_no_bytes_travel(service: RunningService) -> None:
    courier = start_courier(settings(service.endpoint, MANIFEST, ALL, shared_memory="auto"))
    try:
        until(courier, Connected)
        known = service.servicer.sessions.get("s1")
        assert len(known._ranks._shared[0]) == 3
        predicted(courier)
        assert bytes(known._snapshots[20].vector.view) == state(2).tobytes()
        assert bytes(courier.prediction.view) == (state(2) - state(1)).tobytes()
        # A service that has lost them is sent the bytes.
        known._ranks._shared.clear()
        courier.release_prediction(None)
        stage(courier, 3, 30)
        stage(courier, 4, 40)
        until(courier, Prediction)
        assert bytes(courier.prediction.view) == (state(4) - state(3)).tobytes()
        assert not known._ranks._shared
    finally:
        courier.close()


@pytest.mark.parametrize("channels", [1, 2])
def test_an_upload_that_was_cut_off_goes_on_where_it_was(
    service: RunningService, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_arrived, receive = threading.Event(), Session.receive

    def receiving(session: Session, frame: ChunkFrame) -> None:
        receive(session, frame)
        has_arrived.set()

    monkeypatch.setattr(Session, "receive", receiving)
    relay = Relay(service.port, 130_000, has_arrived)
    of_rank = settings(f"127.0.0.1:{relay.port}", MANIFEST, ALL, channels=channels)
    courier = start_courier(of_rank)
    try:
        until(courier, Connected)
        predicted(courier)
        assert relay.num_cuts == 1
        assert bytes(courier.prediction.view) == (state(2) - state(1)).tobytes()
        item = service.servicer.sessions.get("s1")
        assert (item.counts.committed, item.counts.aborted) == (2, 0)
        # With one stream the first chunk had arrived whole when the second was cut off: it did not travel twice.
        again_bytes = relay.bytes_up - 2 * 4 * MANIFEST.num_elements
        assert channels > 1 or again_bytes < 130_000 - CHUNK_BYTES // 2
    finally:
        courier.close()
        relay.close()


def test_a_loss_that_both_sides_notice_counts_once(service: RunningService) -> None:
    courier = start_courier(settings(service.endpoint, MANIFEST, ALL))
    try:
        until(courier, Connected)
        # The service ends a snapshot of which this rank then tries to send its part.
        service.stub.Upload(iter(chunks(state(1).tobytes()[:64], 0, 10)), metadata=SHOWN)
        service.stub.Upload(iter(chunks(state(1).tobytes()[:64], 0, 20)), metadata=SHOWN)
        service.stub.Upload(iter(chunks(state(1).tobytes()[:64], 0, 30)), metadata=SHOWN)
        assert "not complete" in until(courier, Dropped).reason
        stage(courier, 1, 10)
        message = until(courier, Sent)
        assert (message.num_bytes, message.reason) == (0, "")
    finally:
        courier.close()


def test_a_throttled_upload_takes_its_time_and_is_no_fault(service: RunningService) -> None:
    num_bytes = 4 * MANIFEST.num_elements
    of_rank = settings(service.endpoint, MANIFEST, ALL, max_bytes_per_s=num_bytes / 0.5)
    courier = start_courier(of_rank)
    try:
        until(courier, Connected)
        stage(courier, 1, 10)
        message = until(courier, Sent)
        assert message.reason == ""
        assert message.seconds >= 0.3
    finally:
        courier.close()


def test_a_listener_that_never_answers_does_not_delay_the_service_that_follows(tmp_path: Path) -> None:
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(64)
        port = deaf.getsockname()[1]
        client = NowcastClient(
            ClientSettings(
                endpoint=f"127.0.0.1:{port}", token_file=None, tls_ca=None, connect_s=1.0, chunk_s=5.0, stream_s=9.0
            )
        )
        with pytest.raises(UnavailableError, match=rf"no nowcaster service at 127.0.0.1:{port} within 1 s"):
            client.wait_reachable()
        # As when a dying service's child still holds the socket: connected, and silent for ever.
        silent, _ = deaf.accept()
    with silent, RunningService(tmp_path, port=port):
        # Each waits a second; gRPC's own limit for one attempt would be 20.
        for _ in range(12):
            with contextlib.suppress(UnavailableError):
                client.wait_reachable()
                break
        else:
            pytest.fail("the service that follows is not found")
    client.close()
