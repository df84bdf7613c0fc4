"""What a host must have for a training job or a service, looked at one by one."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import platform
import resource
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

Verdict = Literal["ok", "note", "fault"]

SHARED_MEMORY = Path("/dev/shm")
# DeepSpeed's buffer of a rank, which it leaves behind when its process ends.
DEEPSPEED_BUFFERS = "deepspeed_allreduce_buffer_*"
DEEPSPEED_BUFFER_BYTES = 69_206_024
# A service has a file for each vector of each run, and a connection or two for each rank.
MIN_OPEN_FILES = 4096
COMMON_MTU = 1500
# An operator is compiled in a minute or two.
MIN_LOCK_AGE_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one look at the host has shown.

    Attributes:
        name: What was looked at, in a word or two.
        verdict: ``fault``: a job or a service will fail, or hang; ``note``: something that one should know.
        text: What there is, and what to do about it.
    """

    name: str
    verdict: Verdict
    text: str


def look_at_host(*, extensions_dir: Path | None = None, should_clean: bool = False) -> Iterator[Finding]:
    """Looks at everything that needs no service.

    Args:
        extensions_dir: Where PyTorch compiles its extensions; by default where it does.
        should_clean: Whether to remove what ended processes have left: DeepSpeed's buffers and PyTorch's locks.

    Yields:
        Findings, as soon as they are made.
    """
    yield from _packages()
    yield _processor()
    yield _devices()
    yield _compiler()
    yield from _stale_locks(extensions_dir or default_extensions_dir(), should_clean)
    yield _memory()
    yield _shared_memory()
    yield from _left_buffers(should_clean)
    yield _open_files()
    yield _host_name()
    yield from _networks()


def default_extensions_dir() -> Path:
    """Where PyTorch compiles extensions, as it decides itself."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "torch_extensions"


def _packages() -> Iterator[Finding]:
    yield Finding(name="Python", verdict="ok", text=f"{platform.python_version()} on {platform.machine()}")
    yield Finding(name="PyTorch", verdict="ok", text=version("torch"))
    for package, extra, what in (
        ("deepspeed", "trainer", "DeepSpeed jobs cannot run here"),
        ("ray", "service", "`sidecast serve` cannot run here"),
    ):
        try:
            yield Finding(name=package, verdict="ok", text=version(package))
        except PackageNotFoundError:
            yield Finding(name=package, verdict="note", text=f"not installed: {what} (pip install '.[{extra}]')")


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0))
    compiled = importlib.util.find_spec("sidecast.predictors.nino._nino_tiles") is not None
    if compiled:
        return Finding(
            name="processor", verdict="ok", text=f"{cores} cores; the compiled loops of a nowcast are installed"
        )
    text = f"{cores} cores; without compiled loops a nowcast on the CPU takes longer: install g++, then sidecast again"
    return Finding(name="processor", verdict="note", text=text)


def _devices() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding(name="CUDA", verdict="ok", text=", ".join(names))
    if Path("/dev/nvidiactl").exists():
        text = f"there is a GPU, but PyTorch {version('torch')} does not see it: it needs another build, or driver"
        return Finding(name="CUDA", verdict="fault", text=text)
    return Finding(name="CUDA", verdict="note", text="no GPU: everything runs on the CPU")


def _compiler() -> Finding:
    path = shutil.which("g++")
    if path is not None:
        return Finding(name="compiler", verdict="ok", text=path)
    text = "no g++: DeepSpeed compiles an operator when it first runs on a CPU (Debian: apt-get install g++)"
    needs_it = importlib.util.find_spec("deepspeed") is not None
    return Finding(name="compiler", verdict="fault" if needs_it else "note", text=text)


def _stale_locks(folder: Path, should_clean: bool) -> Iterator[Finding]:
    # Named folders, or such in one for each version of Python and CUDA.
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    # Processes of other hosts and containers that share the folder are not seen: what is young may be theirs.
    stale = [path for path in locks if _is_ours(path) and _age_s(path) > MIN_LOCK_AGE_S and not _users_of(path)]
    for path in stale:
        text = f"{path} is held by nobody here, for an hour: whoever needs that extension waits for ever"
        if not should_clean:
            yield Finding(name="extensions", verdict="fault", text=f"{text} (--clean removes it)")
            continue
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            yield Finding(name="extensions", verdict="fault", text=f"{text}; it cannot be removed: {error.strerror}")
        else:
            yield Finding(name="extensions", verdict="note", text=f"{path} was held by nobody, and is removed")
    if not stale:
        yield Finding(name="extensions", verdict="ok", text=f"no lock is left in {folder}")


def _memory() -> Finding:
    values = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, available = (int(values[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    verdict: Verdict = "ok" if available > total / 10 else "note"
    return Finding(name="memory", verdict=verdict, text=f"{available:.1f} of {total:.1f} GiB available")


def _shared_memory() -> Finding:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
    except OSError as error:
        return Finding(name="/dev/shm", verdict="fault", text=f"cannot be used: {error.strerror}")
    mib = usage.free >> 20
    text = f"{mib} MiB free; each rank takes its staging buffers of it, under DeepSpeed on a CPU 66 MiB more"
    if usage.free < 2 * DEEPSPEED_BUFFER_BYTES:
        return Finding(name="/dev/shm", verdict="fault", text=f"{text} (Docker: --shm-size)")
    return Finding(name="/dev/shm", verdict="ok", text=text)


def _left_buffers(should_clean: bool) -> Iterator[Finding]:
    left = [path for path in SHARED_MEMORY.glob(DEEPSPEED_BUFFERS) if _is_ours(path) and not _users_of(path)]
    if not left:
        return
    num_mib = sum(path.stat().st_size for path in left) >> 20
    text = f"{len(left)} buffers of {num_mib} MiB that ended DeepSpeed jobs have left"
    if should_clean:
        for path in left:
            path.unlink(missing_ok=True)
        yield Finding(name="/dev/shm", verdict="note", text=f"{text} are removed")
    else:
        yield Finding(name="/dev/shm", verdict="note", text=f"{text} (--clean removes them)")


def _is_ours(path: Path) -> bool:
    try:
        return path.stat().st_uid == os.geteuid()
    except OSError:
        return False


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _users_of(path: Path) -> Sequence[int]:
    """Processes that have a file open, or mapped, as far as we may look."""
    real = str(path.resolve())
    users = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            is_open = any(os.path.realpath(item) == real for item in (process / "fd").iterdir())
            if is_open or real in (process / "maps").read_text(errors="replace"):
                users.append(int(process.name))
        except OSError:
            # It has ended, or is another user's.
            continue
    return users


def _open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        text = f"{soft} at most; a service of many ranks needs {MIN_OPEN_FILES} or more (ulimit -n)"
        return Finding(name="open files", verdict="note", text=text)
    return Finding(name="open files", verdict="ok", text=f"{soft} at most")


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
        with socket.socket(socket.AF_INET6 if ":" in str(address) else socket.AF_INET) as probe:
            probe.bind((address, 0))
    except OSError as error:
        text = (
            f"{name} is no address of this host ({error.strerror}): process groups (gloo, NCCL) may hang "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, or /etc/hosts)"
        )
        return Finding(name="host name", verdict="note", text=text)
    if ipaddress.ip_address(address).is_loopback:
        text = f"{name} is {address}: ranks on other hosts cannot reach it by its name"
        return Finding(name="host name", verdict="note", text=text)
    return Finding(name="host name", verdict="ok", text=f"{name} is {address}")


def _networks() -> Iterator[Finding]:
    for path in sorted(Path("/sys/class/net").glob("*/mtu")):
        mtu = int(path.read_text())
        if mtu < COMMON_MTU:
            text = f"{path.parent.name} carries {mtu} bytes a packet: ranks of other hosts must not send larger ones"
            yield Finding(name="network", verdict="note", text=text)
    proxies = sorted(name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy"))
    if proxies:
        text = f"{', '.join(proxies)} are set; sidecast goes past proxies, to its service directly"
        yield Finding(name="network", verdict="note", text=text)
