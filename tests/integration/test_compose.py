"""That the Compose file, the images and the service's and trainer's own settings fit each other; builds nothing."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
import subprocess
from collections.abc import Callable
from concurrent import futures
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from sidecast.commands.__main__ import build_parser
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.job.config import load_config

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
MIB = 1 << 20
DEEPSPEED_SHM_BYTES_PER_RANK = 69 * MIB
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))


@pytest.fixture(scope="module")
def compose(find_tool: Callable[[str], str]) -> dict[str, Any]:
    """The Compose file as docker-compose understands it."""
    command = [find_tool("docker-compose"), "--file", REPOSITORY / "docker-compose.yml", "config"]
    environment = {name: value for name, value in os.environ.items() if name not in ("BASE", "TORCH_INDEX")}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return yaml.safe_load(result.stdout)


def instructions(dockerfile: Path) -> list[str]:
    text = re.sub(r"^#.*\n", "", dockerfile.read_text(), flags=re.MULTILINE)
    return re.sub(r"\\\n\s*", "", text).splitlines()


def exec_form(dockerfile: Path, instruction: str) -> list[str]:
    """The words of an instruction's JSON array."""
    (line,) = [line for line in instructions(dockerfile) if line.startswith(f"{instruction} ")]
    words: list[str] = json.loads(line[line.index("[") :])
    return words


def is_in_context(path: str) -> bool:
    """Whether .dockerignore lets a path into the build context; for its form, an allow-list of whole entries."""
    rules = [line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    return any(rule[0] == "!" and fnmatch.fnmatch(path, f"{rule[1:]}*") for rule in rules)


def nowcaster_section(compose: dict[str, Any]) -> dict[str, Any]:
    command = compose["services"]["trainer"]["command"]
    pairs = [command[index + 1].split("=", 1) for index, word in enumerate(command) if word == "--set"]
    values = [(key, int(value) if value.isdigit() else value) for key, value in pairs]
    section: dict[str, Any] = load_config(command[command.index("--config") + 1], values).deepspeed["nowcaster"]
    return section


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_everything_copied_into_an_image_exists_and_is_in_the_context(dockerfile: Path) -> None:
    copies = [line.split()[1:-1] for line in instructions(dockerfile) if line.startswith("COPY ")]
    sources = {word for words in copies if not words[0].startswith("--from") for word in words} - {"."}
    assert sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert is_in_context(source), source


def test_every_package_and_the_readme_are_in_the_context() -> None:
    for path in ("pyproject.toml", "README.md", "src", "sidecast", "trainer", "nowcaster_service", "protos"):
        assert is_in_context(path), path
    assert not is_in_context(".git")
    assert not is_in_context("tests")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_images_do_not_run_as_root(dockerfile: Path) -> None:
    assert [line for line in instructions(dockerfile) if line.startswith("USER ")] == ["USER sidecast"]


def test_each_side_leaves_out_the_others_framework() -> None:
    for side, other in (("service", "trainer"), ("trainer", "service")):
        text = (DEPLOY / f"{side}.Dockerfile").read_text()
        assert f"['optional-dependencies']['{side}']" in text
        assert f"['optional-dependencies']['{other}']" not in text


def test_the_services_command_and_health_check_are_valid() -> None:
    dockerfile = DEPLOY / "service.Dockerfile"
    serve = build_parser().parse_args(exec_form(dockerfile, "CMD"))
    health_check = exec_form(dockerfile, "HEALTHCHECK")
    assert health_check[0] == "sidecast"
    status = build_parser().parse_args(health_check[1:])
    assert status.endpoint == f"127.0.0.1:{serve.port}"
    assert status.token_file == serve.token_file
    exposed = next(line for line in instructions(dockerfile) if line.startswith("EXPOSE ")).split()[1:]
    assert exposed == [str(serve.port), str(serve.metrics_port)]


def test_the_trainer_finds_the_service_and_its_secrets(compose: dict[str, Any]) -> None:
    section = nowcaster_section(compose)
    assert set(section) <= {field.name for field in fields(NowcasterConfig)}
    serve = build_parser().parse_args(exec_form(DEPLOY / "service.Dockerfile", "CMD"))
    assert section["endpoint"] == f"service:{serve.port}"
    certs = compose["services"]["certs"]["entrypoint"]
    assert certs == ["make_certs.sh", str(serve.tls_cert.parent), str(serve.token_file.parent), "service"]
    assert section["token_file"] == str(serve.token_file)
    assert Path(section["tls_ca"]).parent == serve.token_file.parent
    mounts = compose["services"]["trainer"]["volumes"]
    assert f"client-tls:{serve.token_file.parent}:ro" in mounts
    assert not any(mount.startswith("service-tls:") for mount in mounts)


def test_prometheus_scrapes_the_ports_that_are_served(compose: dict[str, Any]) -> None:
    serve = build_parser().parse_args(exec_form(DEPLOY / "service.Dockerfile", "CMD"))
    command = compose["services"]["trainer"]["command"]
    first_port = nowcaster_section(compose)["metrics_port"]
    num_ranks = int(command[command.index("--num_gpus") + 1])
    jobs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    assert targets == {
        "sidecast-service": [f"service:{serve.metrics_port}"],
        "sidecast-trainer": [f"trainer:{first_port + rank}" for rank in range(num_ranks)],
    }
    for mount in compose["services"]["prometheus"]["volumes"]:
        assert Path(mount.split(":")[0]).is_file(), mount


def test_the_trainer_gets_the_shared_memory_that_deepspeed_needs(compose: dict[str, Any]) -> None:
    trainer = compose["services"]["trainer"]
    num_ranks = int(trainer["command"][trainer["command"].index("--num_gpus") + 1])
    assert trainer["shm_size"].endswith("mb")
    assert int(trainer["shm_size"][:-2]) * MIB >= max(256 * MIB, num_ranks * DEEPSPEED_SHM_BYTES_PER_RANK)


def test_it_starts_in_order(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["service"]["depends_on"] == {"certs": {"condition": "service_completed_successfully"}}
    assert services["trainer"]["depends_on"] == {"service": {"condition": "service_healthy"}}


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "recording_rules.yml", "alerts.yml"],
        ["test", "rules", "alerts_test.yml"],
    ],
    ids=" ".join,
)
def test_promtool_accepts_what_is_shipped(find_tool: Callable[[str], str], arguments: list[str]) -> None:
    command = [find_tool("promtool"), *arguments]
    result = subprocess.run(command, cwd=DEPLOY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested() -> None:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"] for group in groups for rule in group["rules"]}
    cases = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    seen_firing = {check["alertname"] for case in cases for check in case["alert_rule_test"] if check.get("exp_alerts")}
    assert seen_firing == alerts


# --- certificates


@pytest.fixture
def make_certs(find_tool: Callable[[str], str], tmp_path: Path) -> Callable[..., str]:
    """Runs the script on ``tmp_path/service`` and ``tmp_path/client`` and returns what it says."""
    find_tool("openssl")

    def make(*names: str) -> str:
        command = [DEPLOY / "make_certs.sh", tmp_path / "service", tmp_path / "client", *names]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in folder.glob("*/*")}


def test_certificates_are_made_once_and_again_for_another_name(make_certs: Callable[..., str], tmp_path: Path) -> None:
    assert make_certs("service").startswith("made a certificate for ")
    made = contents(tmp_path)
    assert set(made) == {"service/tls.crt", "service/tls.key", "client/ca.crt", "client/token"}
    assert len(made["client/token"].strip()) == 64
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("service/tls.key", "client/token")}
    assert modes == {"service/tls.key": 0o400, "client/token": 0o440}
    assert make_certs("service") == "certificate and token are there already\n"
    assert contents(tmp_path) == made
    make_certs("service", "elsewhere.example.org")
    assert contents(tmp_path)["service/tls.crt"] != made["service/tls.crt"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_client_with_the_authority_reaches_a_server_with_the_certificate(
    make_certs: Callable[..., str], tmp_path: Path, host: str
) -> None:
    make_certs("service")
    files = contents(tmp_path)
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    credentials = grpc.ssl_server_credentials([(files["service/tls.key"], files["service/tls.crt"])])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        trusted = grpc.ssl_channel_credentials(files["client/ca.crt"])
        with grpc.secure_channel(f"{host}:{port}", trusted, [("grpc.enable_http_proxy", 0)]) as channel:
            grpc.channel_ready_future(channel).result(timeout=10)
    finally:
        server.stop(None)
