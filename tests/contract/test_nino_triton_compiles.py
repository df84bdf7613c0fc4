"""The kernels compile for the GPU that they are meant for: the interpreter takes what the compiler refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMPILATION = Path(__file__).parents[1] / "support" / "triton_compilation.py"


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("ptx")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, COMPILATION, folder], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kernel", ["message_sums", "changes"])
@pytest.mark.parametrize(
    ("precision", "instructions"),
    [
        ("bf16", ["wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16", "tanh.approx.f32"]),
        ("tf32", ["wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32", "tanh.approx.f32"]),
        ("fp32", ["fma.rn.f32", "ex2.approx"]),
    ],
)
def test_products_are_those_of_the_precision(ptx: Path, kernel: str, precision: str, instructions: list[str]) -> None:
    text = (ptx / f"{kernel}_{precision}.ptx").read_text()
    assert [instruction for instruction in instructions if instruction not in text] == []


def test_features_are_read(ptx: Path) -> None:
    assert "ld.global" in (ptx / "scaled_plane.ptx").read_text()
