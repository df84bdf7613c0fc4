"""Two training hosts and a service on a third, over a network that is cut and then bad: ``python -m tests.hosts``.

Every host is a network namespace with processes, host name, /etc/hosts and /dev/shm of its own. Training starts as
users start it, by ``deepspeed --hostfile`` over pdsh and ssh; the service has TLS and a token.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from tests.hosts.feed import EndedError, Feed
from tests.hosts.network import Host, clear_dead_runs, ip, leftovers
from tests.hosts.uplink import Uplink, open_tun

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = (0, 1)
TRAINERS = ("host-a", "host-b")
SERVICE = "nowcaster"
# Between the trainers, and between them and the service.
TRAIN_ADDRESSES = {"host-a": "10.98.1.1", "host-b": "10.98.1.2"}
ADDRESSES = {"host-a": "10.98.2.1", "host-b": "10.98.2.2", SERVICE: "10.98.2.3"}
SSH_PORT, SERVICE_PORT = 2222, 20051
TOOLS = ("ip", "pdsh", "ssh", "ssh-keygen", "sshd", "openssl", "unshare", "setpriv")
DELAY_S, LOSS = 0.05, 0.05
# The shortest of the courier's timeouts is 5 s: whatever waits for the service waits longer than this.
MAX_STEP_S = 4.5
HANG_S = 300.0
STARTED_S = time.monotonic()
# DeepSpeed's own, which docs/deploy.md tells of.
DEEPSPEEDS_OWN = "deepspeed_allreduce_buffer_"

SSHD_CONFIG = f"""\
Port {SSH_PORT}
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
StrictModes no
PasswordAuthentication no
UsePAM no
PidFile none
"""
SSH_CONFIG = """\
Host *
    IdentityFile /etc/ssh/user_key
    IdentitiesOnly yes
    GlobalKnownHostsFile /etc/ssh/ssh_known_hosts
    UserKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    BatchMode yes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it and says what was seen.

    Returns:
        Exit status: 0, also where hosts cannot be made; 1 if a bar was missed.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.hosts", description=__doc__)
    parser.add_argument("--cut-s", type=float, default=15.0, help="how long the service is cut off (default: 15)")
    parser.add_argument("--interval-s", type=float, default=2.0, help="time between two snapshots (default: 2)")
    parser.add_argument("--policy", choices=("jump", "push"), default="jump", help="default: jump")
    arguments = parser.parse_args(argv)
    reason = why_not()
    if reason:
        say(f"skipped: {reason}")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    clear_dead_runs()
    scratch = Path(tempfile.mkdtemp(prefix="sidecast-hosts-"))
    try:
        with ExitStack() as stack:
            run(stack, scratch, arguments)
        left = leftovers()
        check(not left, f"no namespace, process or file in /etc is left behind: {left}")
    except (MissedError, EndedError) as error:
        say(f"failed: {error}")
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say("all bars held")
    return 0


class MissedError(Exception):
    """A bar was missed."""


def say(text: str) -> None:
    sys.stdout.write(f"{time.monotonic() - STARTED_S:4.0f} s  {text}\n")
    sys.stdout.flush()


def check(holds: bool, text: str) -> None:
    if not holds:
        raise MissedError(text)
    say(f"ok: {text}")


def why_not() -> str:
    """Why there can be no hosts here; empty if there can.

    Raises:
        SystemExit: In CI, a program is missing.
    """
    missing = [name for name in TOOLS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if missing:
        reason = f"not installed: {', '.join(missing)} (Debian: iproute2 openssh-server pdsh openssl)"
        if os.environ.get("CI"):
            sys.exit(f"CI must not skip: {reason}")
        return reason
    if os.geteuid() != 0:
        return "network namespaces need root"
    probe = f"sidecast-hosts-{os.getpid()}-probe"
    try:
        ip("netns", "add", probe)
        ip("netns", "del", probe)
        os.close(open_tun(f"sc{os.getpid()}"))
    except OSError as error:
        return f"network namespaces or TUN interfaces are not allowed here: {error}"
    return ""


def run(stack: ExitStack, scratch: Path, arguments: argparse.Namespace) -> None:
    """The scenario; everything that it starts ends with ``stack``."""
    hosts = make_hosts(stack, scratch)
    uplink = connect(stack, hosts)
    service = start_service(hosts[SERVICE], scratch)
    for name in TRAINERS:
        start_sshd(hosts[name])
    before = {name: len(hosts[name].processes()) for name in TRAINERS}
    say("three hosts are up; launching by deepspeed --hostfile over pdsh")
    (scratch / "nowcaster.json").write_text(json.dumps(section(scratch, arguments.policy)))
    feed = Feed(launch(hosts["host-a"], scratch, arguments.interval_s), scratch / "launch.log", HANG_S)

    feed.wait("step")
    check(True, f"both ranks train; a snapshot every {feed.told('interval')[0]['details']['steps']} steps")
    first = feed.wait("applied")
    check(True, f"a nowcast was applied on both ranks, at step {first}")

    uplink.is_cut = True
    cut_at_s, cut_at_step = time.monotonic(), feed.step
    feed.read_until(cut_at_s + arguments.cut_s)
    feed.wait("disconnected", after_step=cut_at_step)
    uplink.is_cut = False
    cut_s, healed_at_step = time.monotonic() - cut_at_s, feed.step
    slowest_s = feed.slowest_step_s(cut_at_step, healed_at_step)
    check(uplink.num_cut_off > 0, f"the service was cut off for {cut_s:.0f} s ({uplink.num_cut_off} packets lost)")
    check(
        healed_at_step > cut_at_step and slowest_s < MAX_STEP_S,
        f"training went on: {healed_at_step - cut_at_step} steps meanwhile, the slowest took {slowest_s * 1000:.0f} ms "
        f"({feed.slowest_step_s(1, cut_at_step) * 1000:.0f} ms before; bar: {MAX_STEP_S:.1f} s)",
    )
    healed_s = time.monotonic()
    back = feed.wait("applied", base_from=healed_at_step)
    check(True, f"after the cut a nowcast was applied at step {back}, {time.monotonic() - healed_s:.0f} s later")

    uplink.delay_s, uplink.loss = DELAY_S, LOSS
    bad_at_step, num_lost = feed.step, uplink.num_lost
    bad = feed.wait("applied", base_from=bad_at_step)
    num_lost = uplink.num_lost - num_lost
    check(num_lost > 0, f"with {DELAY_S * 1000:.0f} ms and {LOSS:.0%} loss ({num_lost} packets), one at step {bad}")
    slowest_s = feed.slowest_step_s(bad_at_step, feed.step)
    check(slowest_s < MAX_STEP_S, f"the slowest step of that time took {slowest_s * 1000:.0f} ms")

    (scratch / "stop").touch()
    feed.read_to_end()
    status = feed.process.wait()
    check(status == 0, f"the launcher ended with {status}" + ("" if status == 0 else f":\n{feed.tail()}"))
    check_losses(scratch)
    check_applied(feed)
    for name in TRAINERS:
        left = hosts[name].wait_for_processes(before[name])
        files = [item for item in hosts[name].shared_memory() if not item.startswith(DEEPSPEEDS_OWN)]
        check(not left and not files, f"{name} has no process and no shared memory left over: {left + files}")
    end_service(hosts[SERVICE], service)


def make_hosts(stack: ExitStack, scratch: Path) -> dict[str, Host]:
    def key(name: str) -> tuple[str, str]:
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", scratch / name], check=True)
        return (scratch / name).read_text(), (scratch / f"{name}.pub").read_text()

    private, public = key("user")
    host_keys = {name: key(name) for name in TRAINERS}
    known = "".join(f"[{name}]:{SSH_PORT} {host_keys[name][1]}" for name in TRAINERS)
    names = f"127.0.0.1 localhost\n{ADDRESSES[SERVICE]} {SERVICE}\n"
    names += "".join(f"{TRAIN_ADDRESSES[name]} {name}\n" for name in TRAINERS)
    if not Path("/run/sshd").is_dir():
        # sshd's own, which its package leaves to the system's start.
        Path("/run/sshd").mkdir(mode=0o755)
        stack.callback(Path("/run/sshd").rmdir)
    hosts = {SERVICE: stack.enter_context(Host(SERVICE, {"hosts": names}))}
    for name in TRAINERS:
        etc = {
            "hosts": names,
            "ssh/sshd_config": SSHD_CONFIG,
            "ssh/ssh_config": SSH_CONFIG,
            "ssh/host_key": host_keys[name][0],
            "ssh/user_key": private,
            "ssh/authorized_keys": public,
            "ssh/ssh_known_hosts": known,
        }
        hosts[name] = stack.enter_context(Host(name, etc))
    return hosts


def connect(stack: ExitStack, hosts: Mapping[str, Host]) -> Uplink:
    """Trainers directly by a cable, both with the service by an uplink."""
    cable = [f"sc{os.getpid()}{end}" for end in "ab"]
    ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
    for name, end in zip(TRAINERS, cable, strict=True):
        hosts[name].plug(end, "train", f"{TRAIN_ADDRESSES[name]}/24")
    ends = {}
    for index, (name, address) in enumerate(ADDRESSES.items()):
        interface = f"sc{os.getpid()}u{index}"
        ends[address] = open_tun(interface)
        hosts[name].plug(interface, "uplink", f"{address}/24")
    uplink = Uplink(ends)
    uplink.start()
    stack.callback(uplink.stop)
    return uplink


def start_service(host: Host, scratch: Path) -> subprocess.Popen[str]:
    certs = ["sh", REPOSITORY / "deploy" / "make_certs.sh", scratch / "service", scratch / "client", SERVICE]
    subprocess.run(certs, check=True, capture_output=True)
    (scratch / "client" / "token").chmod(0o600)
    (scratch / "client" / "token").write_text(f"{secrets.token_hex(32)}\n")
    service = host.boot(
        *(sys.executable, "-m", "sidecast.commands", "serve"),
        *("--host", ADDRESSES[SERVICE], "--port", f"{SERVICE_PORT}", "--history-gib", "1"),
        *("--history-dir", str(scratch / "history"), "--token-file", str(scratch / "client" / "token")),
        *("--tls-cert", str(scratch / "service" / "tls.crt"), "--tls-key", str(scratch / "service" / "tls.key")),
    )
    await_line(service, "sidecast serves at ")
    return service


def start_sshd(host: Host) -> None:
    sshd = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    assert sshd is not None
    await_line(host.boot(sshd, "-D", "-e"), "Server listening on 0.0.0.0")


def await_line(process: subprocess.Popen[str], start: str) -> None:
    """Reads what a process says until a line begins so."""
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith(start):
            return
    raise MissedError("".join(said[-20:]))


def section(scratch: Path, policy: str) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "endpoint": f"{SERVICE}:{SERVICE_PORT}",
        "tls_ca": str(scratch / "client" / "ca.crt"),
        "token_file": str(scratch / "client" / "token"),
        "predictor": "linear",
        "policy": policy,
        # A verdict on a jump that is no good would end jumps, and with them what is looked at here.
        "probation_steps": 0,
    }
    return settings


def launch(host: Host, scratch: Path, interval_s: float) -> subprocess.Popen[str]:
    """``deepspeed`` as somebody types it who has logged in on the first host."""
    programs = Path(sys.executable).parent
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR", str(REPOSITORY / ".cache" / "torch_extensions"))
    environment = {
        # The programs of the environment: DeepSpeed builds an operator with its ninja.
        "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
        "PYTHONPATH": str(REPOSITORY),
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": "train",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_EXTENSIONS_DIR": extensions,
    }
    # The launcher takes what it passes on to the hosts from here.
    (scratch / "deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in environment.items()))
    (scratch / "hostfile").write_text("".join(f"{name} slots=1\n" for name in TRAINERS))
    exports = " ".join(f"{name}={environment[name]}" for name in ("PATH", "PYTHONPATH", "DS_ACCELERATOR"))
    command = (
        f"cd {REPOSITORY} && {exports} DS_ENV_FILE={scratch}/deepspeed_env deepspeed --hostfile {scratch}/hostfile "
        f"--launcher pdsh --ssh_port {SSH_PORT} --master_addr {TRAIN_ADDRESSES['host-a']} --master_port 29500 "
        f"{REPOSITORY}/tests/hosts/worker.py {scratch} {interval_s}"
    )
    return host.run("ssh", "-p", f"{SSH_PORT}", "root@host-a", command)


def check_losses(scratch: Path) -> None:
    for rank in RANKS:
        losses = json.loads((scratch / f"losses-{rank}.json").read_text())
        live, plain, replay = losses["live"], losses["plain"], losses["replay"]
        check(live[: len(plain)] == plain, f"rank {rank}: the first {len(plain)} losses are those of a run without")
        check(live == replay, f"rank {rank}: all {len(live)} losses are those of a replay without a service")


def check_applied(feed: Feed) -> None:
    applied = [
        [
            (event["step"], event["details"]["version"], event["details"]["digest"])
            for event in feed.told("applied", rank)
        ]
        for rank in RANKS
    ]
    check(applied[0] == applied[1], f"both ranks applied the same {len(applied[0])} nowcasts at the same steps")


def end_service(host: Host, service: subprocess.Popen[str]) -> None:
    host.first_process.send_signal(signal.SIGTERM)
    status = service.wait(HANG_S)
    left = host.wait_for_processes(0)
    check(status == 0 and not left, f"the service ended with {status} and has no process left: {left}")


if __name__ == "__main__":
    sys.exit(main())
