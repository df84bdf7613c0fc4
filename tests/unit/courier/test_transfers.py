"""What an upload hands out, and what it leaves out after an interruption."""

from __future__ import annotations

from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.codec import buffer_digest, split_chunks
from sidecast.trainer.courier.fetch import Download
from sidecast.trainer.courier.upload import Upload

DATA = memoryview(bytes(range(250)))


def upload() -> Upload:
    return Upload(pb.ChunkKey(id=7), len(DATA), lambda start, length: DATA[start : start + length])


def digest(chunk_bytes: int) -> bytes:
    frames = split_chunks(pb.ChunkKey(), DATA, chunk_bytes)
    return buffer_digest((frame.offset_bytes, len(frame.data), frame.crc32) for frame in frames)


def test_streams_share_the_chunks_and_the_digest_is_of_all() -> None:
    sent = upload()
    sent.fill(64)
    one, other = sent.frames(), sent.frames()
    frames = [next(one), next(other), next(one), next(other)]
    assert list(one) == list(other) == []
    assert [frame.offset_bytes for frame in frames] == [0, 64, 128, 192]
    assert b"".join(bytes(frame.data) for frame in frames) == DATA
    assert sent.digest == digest(64)


def test_only_what_did_not_arrive_goes_again() -> None:
    sent = upload()
    sent.fill(64)
    list(sent.frames())
    sent.fill(64, [(0, 64), (128, 192)])
    assert [frame.offset_bytes for frame in sent.frames()] == [64, 192]
    assert sent.digest == digest(64)


def test_bytes_that_arrived_before_this_outbox_was_made_go_again() -> None:
    sent = upload()
    # Their checksums are not known here, and the commit needs them.
    sent.fill(64, [(0, 250)])
    assert len(list(sent.frames())) == 4


def test_a_service_that_came_back_with_another_chunk_size_gets_everything_again() -> None:
    sent = upload()
    sent.fill(64)
    list(sent.frames())
    sent.fill(100, [(0, 250)])
    assert [frame.offset_bytes for frame in sent.frames()] == [0, 100, 200]
    assert sent.digest == digest(100)


def test_an_inbox_is_cut_at_chunks_into_parts_that_cover_it() -> None:
    for num_bytes in (0, 1, 64, 250, 1000):
        for num_parts in (1, 2, 3, 7):
            download = Download(pb.ChunkKey(), memoryview(bytearray(num_bytes)), num_parts, 64)
            assert len(download.parts) <= num_parts
            position = 0
            for part in download.parts:
                assert part.position == position
                assert part.position % 64 == 0
                position = part.stop
            assert position == num_bytes
            assert download.received_bytes == 0
