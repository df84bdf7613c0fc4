"""A real ``sidecast serve`` for tests, and the launcher command that users type."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.support.limits import HANG_S


class ServiceProcess:
    """One service with its folder.

    Args:
        folder: For its log, port file and history.
        arguments: More arguments of ``sidecast serve``.
    """

    def __init__(self, folder: Path, *arguments: str) -> None:
        self._folder = folder
        self._arguments = arguments
        self._process: subprocess.Popen[str] | None = None
        self.history = folder / "history"
        self.address = ""

    def start(self, port: int = 0) -> None:
        """Starts it and waits until it says where it listens."""
        command = [sys.executable, "-m", "sidecast.commands", "serve", "--port", f"{port}"]
        command += ["--history-dir", str(self.history), *self._arguments]
        with (self._folder / "service.log").open("a") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("sidecast serves at "):
                self.address = line.split()[-1]
                return
        raise AssertionError((self._folder / "service.log").read_text()[-4000:])

    @property
    def process(self) -> subprocess.Popen[str]:
        """The command itself."""
        assert self._process is not None
        return self._process

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def family(self) -> list[psutil.Process]:
        """The service's process and all below it, Ray's among them."""
        assert self._process is not None
        top = psutil.Process(self._process.pid)
        return [top, *top.children(recursive=True)]

    def kill(self) -> None:
        """kill -9, and only the process that the user started."""
        assert self._process is not None
        family = self.family()
        self._process.kill()
        self._process.wait()
        _, left = psutil.wait_procs(family, timeout=HANG_S)
        assert left == [], f"left behind by a killed service: {left}"

    def stop(self) -> int:
        """SIGTERM, as a user or a container would; returns the exit status."""
        assert self._process is not None
        if self._process.poll() is not None:
            return self._process.returncode
        family = self.family()
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(HANG_S)
        _, left = psutil.wait_procs(family, timeout=HANG_S)
        assert left == [], f"left behind by a stopped service: {left}"
        return status


def launch(worker: Path, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Starts a worker script on two ranks with the deepspeed launcher."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", f"{free_port()}"]
    with log.open("wb") as stream:
        return subprocess.Popen([*command, str(worker), *arguments], env=environment, stdout=stream, stderr=stream)


def free_port() -> int:
    """A port that nobody listens on now."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
