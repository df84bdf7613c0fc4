"""Hosts on one machine: a network namespace each, with processes, host name and shared memory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

PREFIX = "sidecast-hosts"
# What `ip netns exec` lays over /etc, for the processes of one namespace.
ETC = Path("/etc/netns")
END_S = 30.0
LOOK_S = 0.02


def ip(*words: str) -> None:
    """Runs iproute2.

    Raises:
        OSError: It refused.
    """
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip() or done.returncode}")


class Host:
    """One host; a context manager.

    Args:
        name: Its host name.
        etc: Files that its processes see in ``/etc``, by their path there.
    """

    def __init__(self, name: str, etc: Mapping[str, str]) -> None:
        self.name = name
        self.namespace = f"{PREFIX}-{os.getpid()}-{name}"
        self._etc = etc
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Host:
        folder = ETC / self.namespace
        for path, text in self._etc.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
            # As sshd asks of its keys.
            (folder / path).chmod(0o600 if path.endswith("_key") else 0o644)
        ip("netns", "add", self.namespace)
        ip("-n", self.namespace, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                # Its child, the first process of its host, gets SIGKILL with it, and takes along all others.
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        try:
            left = self.wait_for_processes(0)
        finally:
            ip("netns", "del", self.namespace)
            shutil.rmtree(ETC / self.namespace, ignore_errors=True)
        assert not left, f"{self.name} has processes that outlived it: {left}"

    def plug(self, interface: str, name: str, address: str) -> None:
        """Moves an interface here from this process's network, and gives it a name and an address."""
        ip("link", "set", "dev", interface, "netns", self.namespace, "name", name)
        ip("-n", self.namespace, "addr", "add", address, "dev", name)
        ip("-n", self.namespace, "link", "set", name, "up")

    def boot(self, *command: str) -> subprocess.Popen[str]:
        """Starts the first process of the host; all others end with it.

        Returns:
            Whatever it says is on its ``stdout``. ``first_process`` has its own id.
        """
        own = 'mount -t tmpfs tmpfs /dev/shm && hostname "$0" && exec "$@"'
        unshare = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return self.run(*unshare, "sh", "-c", own, self.name, *command)

    def run(self, *command: str) -> subprocess.Popen[str]:
        """Starts a program in the host's network, outside its processes."""
        process = subprocess.Popen(
            # It ends with this process, however that ends, and its host with it.
            ["setpriv", "--pdeathsig", "KILL", "ip", "netns", "exec", self.namespace, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        return process

    @property
    def first_process(self) -> psutil.Process:
        """Process 1 of the host."""
        return psutil.Process(self._processes[0].pid).children()[0]

    def processes(self) -> list[psutil.Process]:
        """All that run in the host's network now."""
        listed = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True, check=True)
        found = []
        for pid in listed.stdout.split():
            try:
                process = psutil.Process(int(pid))
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def wait_for_processes(self, at_most: int) -> list[str]:
        """Waits until no more than so many are left; returns those that are there after all."""
        deadline_s = time.monotonic() + END_S
        while len(left := self.processes()) > at_most and time.monotonic() < deadline_s:
            psutil.wait_procs(left, timeout=LOOK_S)
        if len(left) <= at_most:
            return []
        return [" ".join(process.cmdline()) for process in left]

    def shared_memory(self) -> list[str]:
        """What lies in the host's own ``/dev/shm``."""
        return sorted(path.name for path in Path(f"/proc/{self.first_process.pid}/root/dev/shm").iterdir())


def clear_dead_runs() -> None:
    """Removes the namespaces of runs that were killed."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    for namespace in [line.split()[0] for line in listed if line.startswith(f"{PREFIX}-")]:
        if not psutil.pid_exists(int(namespace.removeprefix(f"{PREFIX}-").split("-")[0])):
            ip("netns", "del", namespace)
            shutil.rmtree(ETC / namespace, ignore_errors=True)


def leftovers() -> list[str]:
    """What this process's hosts have left on the machine."""
    mine = f"{PREFIX}-{os.getpid()}-"
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.splitlines()
    folders = [str(path) for path in ETC.glob(f"{mine}*")]
    children = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    return [*(line for line in listed if line.startswith(mine)), *folders, *children]
