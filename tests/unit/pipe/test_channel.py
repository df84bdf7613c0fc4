"""Messages between a rank and its courier: whole, in order, and never waited for."""

from __future__ import annotations

import errno
import os
import resource
import socket
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from sidecast.errors import ConfigError
from sidecast.trainer.hook.slots import as_tensor
from sidecast.trainer.pipe.buffers import SharedBuffer, map_inherited
from sidecast.trainer.pipe.channel import MAX_UNSENT_BYTES, Channel, ChannelClosedError
from sidecast.trainer.pipe.messages import (
    TO_COURIER,
    TO_HOOK,
    Committed,
    Failed,
    Log,
    Release,
    Stats,
    ToCourier,
    ToHook,
    Totals,
)

Pair = tuple[Channel[ToCourier, ToHook], socket.socket]
A, B = Failed(step=1, reason="\u00e4" * 5), Committed(step=2)
STATS = Stats(totals=Totals(), step=0, loss=None, suspended=False, train_s=0.0, num_courier_deaths=0)


def courier_end(endpoint: socket.socket) -> Channel[ToHook, ToCourier]:
    return Channel(endpoint, TO_COURIER)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The trainer's end, and the raw socket at the courier's."""
    ours, theirs = socket.socketpair()
    channel = Channel[ToCourier, ToHook](ours, TO_HOOK)
    channel.set_blocking(False)
    yield channel, theirs
    channel.close()
    theirs.close()


def frames(messages: list[ToHook]) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = courier_end(ours)
        for message in messages:
            channel.send(message)
        return theirs.recv(1 << 16)


def test_a_message_may_arrive_byte_by_byte(pair: Pair) -> None:
    channel, theirs = pair
    messages: list[ToHook] = [A, B]
    received: list[ToHook] = []
    for byte in frames(messages):
        theirs.sendall(bytes([byte]))
        received += list(channel.receive())
    assert received == messages


def test_a_message_that_is_there_already_is_not_waited_for(pair: Pair) -> None:
    channel, theirs = pair
    theirs.sendall(frames([A, B]))
    assert next(channel.receive()) == A
    # Would take an hour if it only looked at the socket.
    channel.wait_readable(3600.0)
    assert list(channel.receive()) == [B]


def test_a_full_socket_delays_what_matters_and_loses_what_may_be_lost(pair: Pair) -> None:
    channel, theirs = pair
    theirs.setblocking(False)
    num_stats = 0
    while channel.post(replace(STATS, step=num_stats), may_be_lost=True):
        num_stats += 1
    assert channel.post(Release(record=None))
    assert not channel.post(STATS, may_be_lost=True)
    reader = courier_end(theirs)
    received: list[ToCourier] = []
    while not received or not isinstance(received[-1], Release):
        received += list(reader.receive())
        # Polling for messages also sends what was kept.
        assert list(channel.receive()) == []
    assert received == [*(replace(STATS, step=step) for step in range(num_stats)), Release(record=None)]


def test_what_is_kept_for_a_stopped_courier_is_bounded(pair: Pair) -> None:
    channel, _ = pair
    text = "x" * (1 << 20)
    sent = [channel.post(Log(record={"text": text})) for _ in range(MAX_UNSENT_BYTES // len(text) + 4)]
    assert sent[0]
    assert not sent[-1]
    assert len(channel._unsent) <= MAX_UNSENT_BYTES


def test_what_the_other_side_said_before_it_went_is_still_heard(pair: Pair) -> None:
    channel, theirs = pair
    theirs.sendall(frames([A]))
    theirs.close()
    received = channel.receive()
    assert next(received) == A
    with pytest.raises(ChannelClosedError):
        next(received)
    with pytest.raises(ChannelClosedError):
        channel.post(STATS)


def test_a_blocking_end_reads_until_the_channel_closes(pair: Pair) -> None:
    channel, theirs = pair
    channel.post(STATS)
    channel.close()
    assert list(courier_end(theirs).receive()) == [STATS]


def test_high_descriptors_are_waited_on() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1100:
        pytest.skip(f"this machine allows {hard} descriptors only")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1100), hard))
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(fileno=os.dup2(ours.fileno(), 1050)) as high:
        channel = Channel[ToCourier, ToHook](high, TO_HOOK)
        channel.set_blocking(False)
        theirs.sendall(frames([A]))
        channel.wait_readable(10.0)
        assert list(channel.receive()) == [A]
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_shared_memory_outlives_its_buffer_while_a_tensor_is_made_of_it() -> None:
    buffer = SharedBuffer("test", 12)
    tensor = as_tensor(buffer)
    mapping = weakref.ref(buffer.map)
    tensor.fill_(3.0)
    buffer.close()
    buffer.close()
    del buffer
    assert mapping() is not None
    assert tensor.tolist() == [3.0] * 3
    del tensor
    assert mapping() is None


def test_both_sides_see_one_memory_and_empty_buffers_exist() -> None:
    buffer = SharedBuffer("test", 8)
    other = map_inherited(buffer.descriptor, 8)
    torch.frombuffer(buffer.map, dtype=torch.float32, count=2).copy_(torch.tensor([1.0, 2.0]))
    assert torch.frombuffer(other, dtype=torch.float32).tolist() == [1.0, 2.0]
    empty = SharedBuffer("empty", 0)
    assert (len(empty.view), as_tensor(empty).numel(), len(map_inherited(empty.descriptor, 0))) == (0, 0, 0)
    buffer.close()
    empty.close()


def test_too_little_memory_is_an_error_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # Truly asking for too much would end in the kernel's out-of-memory killer where memory is overcommitted.
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match="no memory for the nowcaster's staging buffer of 4096 bytes: No space left"):
        SharedBuffer("staging", 4096)
