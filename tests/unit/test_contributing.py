"""What a newcomer is told to run is there to be run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
TARGETS = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))


def test_hooks_before_a_commit_call_the_makefile_and_download_nothing() -> None:
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    for hook in config["repos"][0]["hooks"]:
        program, *targets = hook["entry"].split()
        assert (program, hook["language"], hook["pass_filenames"]) == ("make", "system", False)
        assert targets
        assert set(targets) <= TARGETS


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/adr/README.md"])
def test_pages_name_targets_that_exist(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    named = {
        target for line in re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE) for target in line.split()
    }
    assert named
    assert named <= TARGETS


def test_benchmarks_that_run_on_a_cpu_are_run_by_the_makefile() -> None:
    run = set(re.findall(r"-m benchmarks\.(bench_\w+)", (REPOSITORY / "Makefile").read_text()))
    there = {path.stem for path in (REPOSITORY / "benchmarks").glob("bench_*.py")}
    # Without a GPU it takes minutes, in an interpreter whose speed says nothing.
    assert run == there - {"bench_nino_gpu"}
