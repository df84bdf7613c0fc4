"""Settings of ``sidecast serve``, and what ``sidecast status`` shows."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sidecast.commands.__main__ import build_parser, main
from sidecast.errors import ConfigError
from sidecast.nowcaster_service.commands import serve
from sidecast.nowcaster_service.commands.status import render
from sidecast.nowcaster_service.config import ServiceConfig, TlsFiles, is_loopback
from sidecast.protos import nowcast_pb2 as pb
from tests.support.services.harness import service_config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 is reachable from other machines"),
        ({"port": 70_000}, "--port is 70000; allowed: 1 to 65535"),
        ({"metrics_port": 0}, "--metrics-port is 0; allowed: 1 to 65535"),
        ({"chunk_bytes": 1}, "chunk size is 1 bytes; allowed: 65536 to "),
        ({"history_budget_bytes": 0}, "the history budget is 0 bytes"),
        ({"num_engines": 0}, "--engines is 0"),
        ({"engine_threads": 0}, "--engine-threads is 0"),
        ({"engine_gpus": -1.0}, "--engine-gpus is -1"),
        ({"device": "tpu"}, "--device is 'tpu'; allowed: cpu, cuda"),
        ({"nowcast_timeout_s": 60.0}, r"nowcast \(60 s\) < session \(60 s\)"),
        ({"weights": Path("/nowhere")}, "--weights /nowhere is not a file"),
        (
            {"token_file": Path("a"), "tenants_file": Path("b")},
            "--token-file and --tenants-file are both given; allowed: one of them",
        ),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    service_config(tmp_path)
    with pytest.raises(ConfigError, match=words):
        service_config(tmp_path, **changes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tls-cert", "x"], "--tls-cert and --tls-key go together"),
        (["--tls-cert", "/no/cert", "--tls-key", "/no/key"], "--tls-cert /no/cert"),
        (["--tls-client-ca", "/no/ca"], "--tls-client-ca needs --tls-cert and --tls-key"),
        (["--token-file", "/nowhere"], "--token-file /nowhere cannot be read: No such file"),
        (["--token-file", "/dev/null"], "--token-file /dev/null holds no token; allowed: one line"),
        (["--tenants-file", "/nowhere"], "--tenants-file /nowhere cannot be read: No such file"),
        (["--tenants-file", "/dev/null"], "--tenants-file /dev/null names no tenant"),
        (["--history-gib", "nan"], "the history budget is 0 bytes"),
        (["--probe", "/nowhere.npy"], "--probe /nowhere.npy cannot be read: "),
        (["--probe-gpus", "1"], "--probe-tokenizer and --probe-gpus go with --probe, which is missing"),
        (["--probe", "json:loads", "--probe-gpus", "-1"], "--probe-gpus is -1; it must be 0 or more"),
    ],
)
def test_serve_answers_bad_arguments_in_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--port", "1", "--history-dir", str(tmp_path), *arguments]) == 2
    text = capsys.readouterr().err
    assert words in text
    assert text.startswith("sidecast: ")
    assert text.count("\n") == 1


def test_serve_turns_units_into_bytes(tmp_path: Path) -> None:
    args = build_parser(["serve"]).parse_args(["serve", "--port", "7", "--history-gib", "0.5", "--chunk-kib", "128"])
    config = serve.service_config(args, tmp_path)
    assert (config.history_budget_bytes, config.chunk_bytes, config.port) == (1 << 29, 1 << 17, 7)


# Of every option but those for TLS (it takes both), what it sets and to what.
GIVEN = {
    "--host": ("localhost", "host", "localhost"),
    "--port": ("7", "port", 7),
    "--metrics-port": ("8", "metrics_port", 8),
    "--page-port": ("9", "page_port", 9),
    "--page-control": ("", "page_control", True),
    "--weights": ("a-file", "weights", Path("a-file")),
    "--history-gib": ("0.5", "history_budget_bytes", 1 << 29),
    "--history-gib-per-run": ("0.25", "run_budget_bytes", 1 << 28),
    "--max-sessions": ("7", "max_sessions", 7),
    "--chunk-kib": ("128", "chunk_bytes", 1 << 17),
    "--engines": ("2", "num_engines", 2),
    "--engine-threads": ("3", "engine_threads", 3),
    "--device": ("cpu", "device", "cpu"),
    "--engine-gpus": ("0.5", "engine_gpus", 0.5),
    "--nowcast-timeout-s": ("2.5", "nowcast_timeout_s", 2.5),
    "--engines-timeout-s": ("9", "engines_timeout_s", 9.0),
    "--session-timeout-s": ("4000", "session_timeout_s", 4000.0),
    "--token-file": ("a-file", "token_file", Path("a-file")),
    "--tenants-file": ("tenants", "tenants_file", Path("tenants")),
    "--probe": ("json:loads", "probe", "json:loads"),
}


def parsed(folder: Path, *arguments: str) -> ServiceConfig:
    return serve.service_config(build_parser(["serve"]).parse_args(["serve", *arguments]), folder)


def test_without_options_every_setting_has_its_declared_default(tmp_path: Path) -> None:
    assert parsed(tmp_path) == ServiceConfig(history_dir=tmp_path)


def test_every_setting_has_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {"--tls-cert", "--tls-key", "--tls-client-ca", "--history-dir", "--port-file", "--ray-address"}
    of_a_probe = {"--probe-tokenizer": "probe_tokenizer", "--probe-gpus": "probe_gpus"}
    assert set(GIVEN) | plain | of_a_probe.keys() == {option.flag for option in serve.OPTIONS}
    assert {name for _, name, _ in GIVEN.values()} | {"tls", "history_dir", *of_a_probe.values()} == {
        item.name for item in dataclasses.fields(ServiceConfig)
    }
    monkeypatch.chdir(tmp_path)
    Path("a-file").write_text("secret\n")
    Path("tenants").write_text(f"one {'0' * 64}\n")
    for flag, (text, name, value) in GIVEN.items():
        # Engines may run in another folder.
        setting: Any = {name: value.absolute() if isinstance(value, Path) else value}
        assert parsed(tmp_path, flag, *text.split()) == ServiceConfig(history_dir=tmp_path, **setting), flag
    pair = TlsFiles(certificate=Path("a-file"), private_key=Path("a-file"))
    both = ("--tls-cert", "a-file", "--tls-key", "a-file")
    assert parsed(tmp_path, *both).tls == pair
    mutual = dataclasses.replace(pair, client_authority=Path("a-file"))
    assert parsed(tmp_path, *both, "--tls-client-ca", "a-file").tls == mutual


def test_a_probe_is_found_from_any_folder_and_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("probe.npy", np.arange(4))
    config = parsed(tmp_path, "--probe", "probe.npy", "--probe-gpus", "0.5")
    assert (config.probe, config.probe_gpus) == (str(tmp_path / "probe.npy"), 0.5)
    Path("probe.txt").write_text("a")
    with pytest.raises(ConfigError, match=f"--probe-tokenizer {tmp_path}/own has no tokenizer.json"):
        parsed(tmp_path, "--probe", "probe.txt", "--probe-tokenizer", "own")


def test_port_0_is_a_free_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "_free_port", lambda host: 12345 if host == "127.0.0.1" else 0)
    assert parsed(tmp_path, "--port", "0").port == 12345


def test_the_help_shows_defaults_in_the_options_own_units(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_parser(["serve"]).parse_args(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "address to bind (default: 127.0.0.1)",
        "in GiB (default: 16)",
        "both ways (default: 1024)",
        "(default: a temporary one)",
        "given up (default: 300)",
        "must send; this or --tenants-file is needed off loopback --tenants-file",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--history-gib", "much"], "argument --history-gib: invalid float value: 'much'"),
        (["--chunk-kib", "0.5"], "argument --chunk-kib: invalid int value: '0.5'"),
    ],
)
def test_what_is_no_number_is_answered_with_its_option(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"sidecast serve: error: {words}"


def test_status_asks_where_serve_listens_and_needs_no_pytorch_for_it() -> None:
    # A container's health check runs it every few seconds.
    code = (
        "import sys; from sidecast.commands.__main__ import build_parser; "
        "print(build_parser(['status']).parse_args(['status']).endpoint, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["127.0.0.1:50051", "False"]


def test_status_names_a_missing_token_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--token-file", "/nowhere"]) == 2
    assert "--token-file /nowhere cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "expected"), [("localhost", True), ("127.9.9.9", True), ("::1", True), ("10.0.0.1", False), ("h", False)]
)
def test_only_loopback_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_status_shows_a_session() -> None:
    session = pb.SessionStatus(
        session_id="s1",
        run_id="run",
        predictor="linear",
        world_size=2,
        num_joined=2,
        num_parameters=1234567,
        history_steps=[10, 20],
        context_len=5,
        num_committed=3,
        num_aborted=1,
        num_published=1,
        num_applied=1,
    )
    text = render(pb.StatusReply(service_version="1", history_budget_bytes=1 << 30, sessions=[session]))
    for words in ("1,234,567 parameters", "2 of 5 states (steps 10, 20)", "3 committed, 1 aborted", "1 applied"):
        assert words in text
