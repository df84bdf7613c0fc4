"""``sidecast doctor``: what is wrong with a host, before a job or a service finds out."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from sidecast.commands.host_checks import Finding, look_at_host

MARKS = {"ok": " ", "note": "-", "fault": "!"}
# `status` waits for the service for five seconds; the rest is Python's own start.
STATUS_TIMEOUT_S = 60.0
SERVICE_FILES = ("token_file", "tls_ca", "tls_cert", "tls_key")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="say what is wrong with this host",
        description="Looks at what a training job or a service needs of this host, and whether a service can be "
        "reached from it. Exit status 1: something is at fault.",
    )
    parser.add_argument("endpoint", nargs="?", help="HOST:PORT of a service that this host is to reach")
    parser.add_argument("--token-file", type=Path, help="file holding the shared secret")
    parser.add_argument("--tls-ca", type=Path, help="PEM certificate of the authority that signed the service's")
    parser.add_argument("--tls-cert", type=Path, help="PEM certificate to show, where the service asks for one")
    parser.add_argument("--tls-key", type=Path, help="its PEM private key")
    parser.add_argument("--clean", action="store_true", help="remove what ended jobs have left")
    parser.add_argument("--json", action="store_true", help="write findings as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    findings = []
    for finding in chain(look_at_host(should_clean=args.clean), _service(args)):
        findings.append(finding)
        if not args.json:
            sys.stdout.write(f"{MARKS[finding.verdict]} {finding.name:<12} {finding.text}\n")
    if args.json:
        sys.stdout.write(json.dumps([asdict(finding) for finding in findings], indent=1) + "\n")
    return int(any(finding.verdict == "fault" for finding in findings))


def _service(args: argparse.Namespace) -> Iterator[Finding]:
    """Asks a service as `sidecast status` does, in a process of its own: this side knows nothing of the wire."""
    if args.endpoint is None:
        return
    command = [sys.executable, "-m", "sidecast.commands", "status", args.endpoint]
    for name in SERVICE_FILES:
        if getattr(args, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=STATUS_TIMEOUT_S)
        lines = (done.stdout or done.stderr).splitlines()
        # What it says of itself; of a service that is of no use also why.
        text = "; ".join(lines[:2] if done.returncode == 1 else lines[:1])
        is_well = done.returncode == 0
    except subprocess.TimeoutExpired:
        text, is_well = f"no answer within {STATUS_TIMEOUT_S:g} s", False
    yield Finding(name="service", verdict="ok" if is_well else "fault", text=text.removeprefix("sidecast: "))
