"""The network between hosts and service: every packet goes through here, late, lost or cut off as a test wants it.

``tc netem`` would do as much where the kernel has it; many have not, and it does not say what it did to whom.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time
from collections.abc import Mapping
from ipaddress import IPv4Address

# Of linux/if_tun.h: packets without a header of the driver's, each with all checksums in it.
TUNSETIFF = 0x400454CA
IFF_TUN = 0x0001
IFF_NO_PI = 0x1000
MTU_BYTES = 1500
MAX_BURST = 64


def open_tun(name: str) -> int:
    """Makes a TUN interface in this process's network; it is there as long as the descriptor is open."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor


class Uplink(threading.Thread):
    """Carries IPv4 packets between TUN interfaces.

    Args:
        ends: The descriptor of every interface, by the address behind it.

    Attributes:
        is_cut: Nothing gets through.
        delay_s: How long each packet takes, one way.
        loss: The share of packets that are lost.
        num_carried: Packets that were taken on for delivery.
        num_lost: Packets that were lost by ``loss``.
        num_cut_off: Packets that met a cut.
    """

    def __init__(self, ends: Mapping[str, int]) -> None:
        super().__init__(name="uplink", daemon=True)
        self.is_cut = False
        self.delay_s = 0.0
        self.loss = 0.0
        self.num_carried = self.num_lost = self.num_cut_off = 0
        self._ends = {IPv4Address(address).packed: descriptor for address, descriptor in ends.items()}
        self._random = random.Random(17)
        self._due: list[tuple[float, int, int, bytes]] = []
        self._woken, self._waker = os.pipe()

    def run(self) -> None:
        """Until it is stopped."""
        poll = select.poll()
        for descriptor in (*self._ends.values(), self._woken):
            poll.register(descriptor, select.POLLIN)
        while True:
            wait_ms = max(0.0, self._due[0][0] - time.monotonic()) * 1000 if self._due else None
            ready = {descriptor for descriptor, _ in poll.poll(wait_ms)}
            if self._woken in ready:
                return
            for descriptor in ready:
                self._take_from(descriptor)
            while self._due and self._due[0][0] <= time.monotonic():
                _, _, target, packet = heapq.heappop(self._due)
                self._deliver(target, packet)

    def _take_from(self, descriptor: int) -> None:
        for _ in range(MAX_BURST):
            try:
                packet = os.read(descriptor, MTU_BYTES)
            except BlockingIOError:
                return
            target = self._ends.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if target is None:
                # Neighbours that IPv6 looks for when an interface comes up.
                continue
            if self.is_cut:
                self.num_cut_off += 1
            elif self._random.random() < self.loss:
                self.num_lost += 1
            else:
                self.num_carried += 1
                heapq.heappush(self._due, (time.monotonic() + self.delay_s, self.num_carried, target, packet))

    def _deliver(self, target: int, packet: bytes) -> None:
        # What was on its way when the cut came does not arrive either.
        if self.is_cut:
            self.num_cut_off += 1
            return
        try:
            os.write(target, packet)
        except OSError:
            # A full queue, or an interface that is down, loses it, as anywhere.
            self.num_lost += 1

    def stop(self) -> None:
        """Ends it, and the interfaces with it."""
        os.write(self._waker, b"x")
        self.join()
        for descriptor in (*self._ends.values(), self._woken, self._waker):
            os.close(descriptor)
