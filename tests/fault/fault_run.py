"""Conducts two training ranks and their service through faults, strikes where a fault says so, and counts."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from zlib import crc32

import fault_rank
import fault_service
import psutil
from fault_rank import WORLD_SIZE, Passage
from faults import PERIOD_STEPS, Fault

from sidecast.manifest import ParameterSpec
from sidecast.protos.shards import ShardSpec
from tests.support.limits import HANG_S
from tests.support.programs.forking import forking_context

# So many steps are made without a service before it is started again.
OUTAGE_STEPS = 12
STOP_S = 30.0
# Reached only when something hangs: a fault that can no longer fire, or be noticed, is told at once.
# Every call is made in every window.
MAX_WINDOWS_BEFORE_FIRE = 3
POLL_INTERVAL_S = 0.02
LARGEST_FILE_BYTES = 64 << 10
STRIKES = ("kill the service", "kill couriers", "stop", "fill the disk", "fill the record disk", "delay")
SERVICE_CALLS = ("Open", "Upload", "Commit", "Predict", "Watch", "Fetch")


@dataclass(frozen=True)
class Outcome:
    """What became of a run through one fault.

    Attributes:
        num_fired: How often the fault fired.
        passages: Of each rank.
    """

    num_fired: int
    passages: tuple[Passage, ...]


class FaultRun:
    """Two ranks that train until ``close``, and their service.

    Args:
        folder: For everything.
        transfers: How snapshots and predictions travel: settings of the hook.

    Attributes:
        is_well: Whether it has come through everything so far; set by whoever has checked the last outcome.
    """

    def __init__(self, folder: Path, **transfers: str) -> None:
        self._folder = folder
        # A rank whose memory is mapped sends nothing that could be altered.
        self._shares = True
        self._has_lost_memory = False
        self._undo: Callable[[], None] | None = None
        (folder / "published").mkdir()
        self.is_well = False
        self._port = 0
        # Forks of one process that has imported everything: a service that is killed twenty times is back at once.
        self._context = forking_context()
        self._progress = self._context.RawArray("q", WORLD_SIZE)
        self._start_service(None)
        self._links: list[Connection] = []
        self._ranks: list[Any] = []
        for rank in range(WORLD_SIZE):
            ours, theirs = self._context.Pipe()
            arguments = (rank, folder, f"127.0.0.1:{self._port}", theirs, self._progress, transfers)
            process = self._context.Process(target=fault_rank.train, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._links.append(ours)
            self._ranks.append(process)
        self.shards: list[tuple[ShardSpec, ...]] = []
        for link in self._links:
            _, shards, self._parameters = self._expect(link, HANG_S)
            self.shards.append(shards)

    def _start_service(self, fault: Fault | None) -> None:
        self._service_link, theirs = self._context.Pipe()
        arguments = (theirs, self._folder, self._port, fault, self._shares)
        self._service = self._context.Process(target=fault_service.serve, args=arguments, daemon=True)
        self._service.start()
        theirs.close()
        self._port = self._expect(self._service_link, HANG_S)

    def _expect(self, link: Connection, timeout_s: float) -> Any:
        try:
            assert link.poll(timeout_s), f"nothing is said any more\n{self.logs()}"
            return link.recv()
        except EOFError:
            raise AssertionError(f"a process has ended\n{self.logs()}") from None

    def logs(self) -> str:
        """The ends of everybody's logs."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self._folder.glob("*.log")))

    def close(self) -> None:
        """Ends everything."""
        if self._undo is not None:
            # A courier that is still stopped would not notice that its rank has ended.
            with contextlib.suppress(ProcessLookupError):
                self._undo()
        for link in self._links:
            with contextlib.suppress(OSError):
                link.send(None)
        for process in self._ranks:
            process.join(HANG_S if self.is_well else 0)
            process.kill()
        self._kill_service()

    # --- one fault

    def pass_through(self, fault: Fault | None) -> Outcome:
        """Lets the ranks train through a fault until a later nowcast has been applied.

        Args:
            fault: None: nothing goes wrong.
        """
        self.is_well = False
        self._num_fired = 0
        self._fired_at_step = 0
        self._applied_base_steps: set[int] = set()
        self._reasons: list[str] = []
        self._restart_at_step: int | None = None
        self._over_at_s = 0.0
        self._undo = None
        shares = fault is None or fault.way != "bf16"
        lacks_memory = self._has_lost_memory and fault is not None and fault.way == "shared"
        if self._shares != shares or lacks_memory or (fault is not None and fault.begins_anew):
            self._shares, self._has_lost_memory = shares, False
            self._kill_service()
            self._start_service(fault)
        elif fault is not None and fault.call in SERVICE_CALLS:
            self._service_link.send(fault)
        self._has_lost_memory |= fault is not None and fault.ends_sharing
        for link in self._links:
            link.send(("train", fault))
        passages: dict[int, Passage] = {}
        is_over = False
        deadline_s = time.monotonic() + HANG_S
        while len(passages) < WORLD_SIZE:
            assert time.monotonic() < deadline_s, f"{fault}: no end: {self._reasons}\n{self.logs()}"
            for source in wait([self._service_link, *self._links], POLL_INTERVAL_S):
                assert isinstance(source, Connection)
                self._hear(source, fault, passages)
            if not is_over and self._is_over(fault):
                is_over = True
                for link in self._links:
                    link.send("heal")
        return Outcome(self._num_fired, tuple(passages[rank] for rank in range(WORLD_SIZE)))

    def _hear(self, source: Connection, fault: Fault | None, passages: dict[int, Passage]) -> None:
        message = self._expect(source, 0.0)
        if source is self._service_link or message[0] == "fired":
            assert fault is not None
            self._num_fired += 1
            self._fired_at_step = max(self._progress)
            if fault.what in STRIKES:
                self._strike(fault)
                with contextlib.suppress(OSError):
                    source.send("go")
        elif message[0] == "event":
            self._reasons.append(f"{message[1]}: {message[3].get('reason', '')}")
            if message[1] == "applied" and fault is not None:
                self._applied_base_steps.add(message[3]["base_step"])
                self._require_hope(fault)
        else:
            passages[self._links.index(source)] = message[1]

    def _is_over(self, fault: Fault | None) -> bool:
        """Whether nothing is wrong any more; mends what can be mended now."""
        if fault is None:
            return True
        if self._num_fired < fault.times or not self._is_noticed(fault):
            return False
        if time.monotonic() < self._over_at_s:
            return False
        if self._restart_at_step is not None:
            if min(self._progress) < self._restart_at_step:
                return False
            self._start_service(None)
            self._restart_at_step = None
        if self._undo is not None:
            self._undo()
            self._undo = None
        return True

    def _require_hope(self, fault: Fault) -> None:
        """Fails once later nowcasts have come through that the fault should have met, or been noticed before."""
        latest = max(self._applied_base_steps)
        if self._num_fired == 0:
            hopeless = len(self._applied_base_steps) > MAX_WINDOWS_BEFORE_FIRE
        else:
            # The reasons of the other rank may be heard a little later than this one's jump.
            hopeless = latest > self._fired_at_step + PERIOD_STEPS
        if hopeless and self._num_fired < fault.times:
            raise AssertionError(f"{fault} has fired {self._num_fired} of {fault.times} times, and can no more")
        if hopeless and not self._is_noticed(fault):
            raise AssertionError(f"{fault} was not noticed: {fault.seen!r} is not in {self._reasons}")

    def _is_noticed(self, fault: Fault) -> bool:
        is_told = fault.seen == "" or any(fault.seen in reason for reason in self._reasons)
        return is_told and (fault.logged == "" or fault.logged in self.logs())

    # --- strikes

    def _strike(self, fault: Fault) -> None:
        match fault.what:
            case "kill the service":
                self._kill_service()
                self._restart_at_step = max(self._progress) + OUTAGE_STEPS
            case "kill couriers":
                for rank in fault.victims:
                    self.courier(rank).kill()
            case "fill the disk":
                self._undo = _allow_only_small_files(self._service.pid)
            case "fill the record disk":
                self._undo = _allow_only_small_files(self.courier(fault.victims[0]).pid)
            case "stop":
                self._over_at_s = time.monotonic() + STOP_S
                self._undo = _stop([self._service.pid, *(self.courier(rank).pid for rank in fault.victims)])
            case "delay":
                self._wait_for_steps(2 * PERIOD_STEPS)

    def _kill_service(self) -> None:
        self._service.kill()
        self._service.join()
        self._service_link.close()
        # One that never says anything, until there is a service again.
        self._service_link, self._silence = self._context.Pipe()

    def courier(self, rank: int) -> psutil.Process:
        """A rank's courier process."""
        (courier,) = psutil.Process(self._ranks[rank].pid).children()
        return courier

    def num_couriers(self, rank: int) -> int:
        """How many couriers a rank has, dead ones that it did not collect among them."""
        return len(psutil.Process(self._ranks[rank].pid).children())

    def _wait_for_steps(self, num_steps: int) -> None:
        target = max(self._progress) + num_steps
        while min(self._progress) < target:
            wait(self._links, POLL_INTERVAL_S)

    # --- what must hold

    def published_checksum(self, digest: str, rank: int) -> int:
        """Checksum of a rank's part of a prediction that the service has found good and published.

        Raises:
            FileNotFoundError: It has not.
        """
        data = (self._folder / "published" / f"{digest}.f32").read_bytes()
        offsets = [0]
        for spec in self._parameters:
            assert isinstance(spec, ParameterSpec)
            offsets.append(offsets[-1] + spec.numel)
        checksum = 0
        for shard in self.shards[rank]:
            start = 4 * (offsets[shard.parameter] + shard.start)
            checksum = crc32(data[start : start + 4 * shard.numel], checksum)
        return checksum

    def attach_without_memory(self, rank: int) -> list[str]:
        """What the ranks say when one of them has no room for shared memory."""
        for link in self._links:
            link.send(("attach", rank))
        return [self._expect(link, HANG_S)[1] for link in self._links]


def _stop(pids: Sequence[int]) -> Callable[[], None]:
    """Stops processes until what is returned is called."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)

    def undo() -> None:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)

    return undo


def _allow_only_small_files(pid: int) -> Callable[[], None]:
    """Lets a process's writes fail like on a full disk, until what is returned is called."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (LARGEST_FILE_BYTES, hard))

    def undo() -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))

    return undo
