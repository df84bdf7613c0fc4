"""What the batch scripts would run: shellcheck accepts them, and stand-ins for Slurm write down their commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecast.commands.__main__ import build_parser
from sidecast.trainer.job.config import load_config, parse_override

REPOSITORY = Path(__file__).resolve().parents[3]
SCRIPTS = sorted((REPOSITORY / "deploy" / "slurm").glob("*.sbatch"))
SHELL_FILES = [*SCRIPTS, *sorted((REPOSITORY / "deploy").glob("*.sh"))]
# Writes its words as a line of JSON. A job that brings its service ends when training does, and the service with it:
# training waits until that has written, too.
SRUN = """
import json, os, sys
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(words) + "\\n")
if "--overlap" in words:
    open(os.environ["HAS_WRITTEN"], "r" if "sidecast.trainer.main" in words else "w").close()
"""
# A service that is no step.
SIDECAST = """
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps(sys.argv) + "\\n")
"""
SCONTROL = """
import os, sys
assert sys.argv[1:] == ["show", "hostnames", "n[1-2]"]
print(os.environ["HOSTS"])
"""
PROGRAMS = {"srun": SRUN, "sidecast": SIDECAST, "scontrol": SCONTROL}


@pytest.fixture
def submit(tmp_path: Path, find_tool: Callable[[str], str]) -> Callable[..., list[list[str]]]:
    """Runs a script as a job on the given hosts; returns the words of each ``srun``."""
    find_tool("openssl")
    programs = tmp_path / "bin"
    programs.mkdir()
    os.mkfifo(tmp_path / "has-written")
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!{sys.executable}{text}")
        (programs / name).chmod(0o755)

    def run(script: str, *words: str, hosts: tuple[str, ...]) -> list[list[str]]:
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"),
            "HAS_WRITTEN": str(tmp_path / "has-written"),
            "HOSTS": "\n".join(hosts),
            "VENV": str(tmp_path),
            "RUN": str(tmp_path / "run"),
            "STATE": str(tmp_path / "state"),
            "CLIENT": str(tmp_path / "state" / "client"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_CPUS_PER_TASK": "4",
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
        }
        (tmp_path / "calls").write_text("")
        command = ["bash", str(REPOSITORY / "deploy" / "slurm" / script), *words]
        result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return run


def behind(words: list[str], program: str) -> list[str]:
    """The words after a program, or after a module."""
    (index,) = [index for index, word in enumerate(words) if word == program or word.endswith(f"/bin/{program}")]
    return words[index + 1 :]


def service_first(calls: list[list[str]]) -> list[list[str]]:
    """The service starts in the background: either may be the first."""
    return sorted(calls, key=lambda words: "serve" not in words)


def section_of(words: list[str]) -> dict[str, Any]:
    """The nowcaster's settings of a training job."""
    job = behind(words, "sidecast.trainer.main")
    pairs = [parse_override(job[index + 1]) for index, word in enumerate(job) if word == "--set"]
    section: dict[str, Any] = load_config("default", pairs).deepspeed["nowcaster"]
    return section


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path: Path, find_tool: Callable[[str], str]) -> None:
    shell = [] if path.suffix == ".sh" else ["--shell", "bash"]
    for command in ([find_tool("shellcheck"), *shell, path], ["bash", "-n", path]):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr


def test_a_jobs_own_service_on_one_node_listens_there_alone(submit: Callable[..., list[list[str]]]) -> None:
    calls = submit("service_per_job.sbatch", "--steps", "20", hosts=("n1",))
    service, training = service_first(calls)
    serve = build_parser().parse_args(behind(service, "sidecast"))
    assert (serve.host, serve.token_file, serve.tls_cert) == ("127.0.0.1", None, None)
    section = section_of(training)
    assert section["endpoint"] == f"127.0.0.1:{serve.port}"
    assert not {"tls_ca", "token_file"} & set(section)
    # Together they have what the job has.
    cpus = [int(words[words.index("--cpus-per-task") + 1]) for words in (service, training)]
    assert cpus == [1, 3]
    assert "--overlap" in service
    assert training[-2:] == ["--steps", "20"]


def test_a_jobs_own_service_on_several_nodes_has_tls_and_a_token(submit: Callable[..., list[list[str]]]) -> None:
    calls = submit("service_per_job.sbatch", hosts=("n1", "n2"))
    service, training = service_first(calls)
    serve = build_parser().parse_args(behind(service, "sidecast"))
    section = section_of(training)
    assert serve.host == "0.0.0.0"
    assert section["endpoint"] == f"n1:{serve.port}"
    assert section["token_file"] == str(serve.token_file)
    for path in (serve.token_file, serve.tls_cert, serve.tls_key, Path(section["tls_ca"])):
        assert path.is_file()
    launcher = behind(training, "torchrun")
    assert service[service.index("--nodelist") + 1] == launcher[launcher.index("--master-addr") + 1] == "n1"
    assert launcher[launcher.index("--nnodes") + 1] == training[training.index("--nodes") + 1] == "2"
    assert launcher[launcher.index("--master-port") + 1] != str(serve.port)


def test_a_clusters_service_is_found_by_jobs(submit: Callable[..., list[list[str]]], tmp_path: Path) -> None:
    (service,) = submit("service.sbatch", "--history-gib", "4", hosts=("n9",))
    serve = build_parser().parse_args(behind(service, "sidecast"))
    assert serve.history_dir == tmp_path / "state" / "history"
    assert serve.engine_threads == 4
    token = serve.token_file.read_text()
    # A service that follows has the same token, as long as its certificate is good for its node.
    submit("service.sbatch", hosts=("n9",))
    assert serve.token_file.read_text() == token
    (training,) = submit("train.sbatch", "--lr", "0.001", hosts=("n1", "n2"))
    section = section_of(training)
    assert section["endpoint"] == f"n9:{serve.port}"
    assert Path(section["tls_ca"]).is_file()
    assert section["token_file"] == str(serve.token_file)
    assert training[-2:] == ["--lr", "0.001"]
