"""Who asks for a device gets it, or one line that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sidecast.commands.__main__ import build_parser
from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.commands import serve
from sidecast.nowcaster_service.nowcasting import Nowcasting, PredictorRequest
from sidecast.predictors.device import open_device
from sidecast.predictors.registry import create_predictor
from sidecast.predictors.wnn import WnnConfig, WnnNetwork

MANIFEST = ModelManifest.from_shapes([("a", [2, 3])])


@pytest.fixture
def wnn_path(tmp_path: Path) -> Path:
    save_file(WnnNetwork(WnnConfig()).state_dict(), tmp_path / "wnn.safetensors")
    return tmp_path / "wnn.safetensors"


@pytest.mark.parametrize("num_devices", [0, 2])
def test_a_missing_gpu_is_refused_where_it_would_be_used(
    num_devices: int, wnn_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
    # Made without one: the process that asks need not be the one that computes.
    predictor = create_predictor("wnn", weights=wnn_path, options={"device": "cuda:2"})
    with pytest.raises(ConfigError, match=r"device is 'cuda:2', but this process sees (no|2) CUDA device"):
        predictor.plan(MANIFEST, 1)  # type: ignore[attr-defined]
    assert open_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["tpu", "cuda:x", ""])
def test_unknown_devices(device: str, wnn_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"device is .*; allowed: cpu, cuda"):
        create_predictor("wnn", weights=wnn_path, options={"device": device})


def test_a_device_is_a_name(wnn_path: Path) -> None:
    with pytest.raises(ConfigError, match="option 'device' of predictor 'wnn' is 0; a string is needed"):
        create_predictor("wnn", weights=wnn_path, options={"device": 0})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "tf32"}, "precision is 'tf32'; allowed on cpu: fp32, bf16, auto"),
        ({"precision": "auto", "device": "cuda"}, "precision is 'auto'; allowed on cuda: fp32, tf32, bf16"),
        ({"loops": "sse"}, "loops is 'sse'; allowed: auto, torch, amx, avx512_bf16, avx512, avx2, portable"),
        (
            {"loops": "amx"},
            "loops is 'amx', which multiply in bf16; precision is 'fp32'; allowed with these loops: bf16, auto",
        ),
        (
            {"loops": "avx2", "precision": "bf16"},
            "loops is 'avx2', which multiply in fp32; precision is 'bf16'; allowed with these loops: fp32, auto",
        ),
        ({"loops": "avx2", "device": "cuda"}, "loops is 'avx2'; allowed on cuda: auto"),
        ({"precision": "fp8", "device": "cuda"}, "precision is 'fp8'; allowed on cuda: fp32, tf32, bf16"),
        ({"device": "gpu"}, "device is 'gpu'; allowed: cpu, cuda"),
    ],
)
def test_precision_goes_with_the_device(options: dict[str, object], words: str, nino_data: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        create_predictor("nino", weights=nino_data / "nino_no_posw.pt", options=options)
    create_predictor("nino", weights=nino_data / "nino_no_posw.pt", options={"precision": "tf32", "device": "cuda:0"})


@pytest.mark.parametrize(
    ("predictor", "options", "refusal"),
    [
        ("wnn", {}, "device is 'cuda', but this process sees no CUDA device; allowed here: cpu"),
        ("wnn", {"device": "cpu"}, ""),
        ("linear", {}, ""),
    ],
)
def test_the_services_device_unless_a_run_says_otherwise(
    predictor: str, options: dict[str, object], refusal: str, wnn_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    request = PredictorRequest(
        predictor=predictor, options=options, manifest_json=MANIFEST.to_json(), context_len=5, max_horizon=1
    )
    assert Nowcasting(wnn_path, device="cuda").check(request).refusal == refusal


@pytest.mark.parametrize(
    ("arguments", "num_gpus"),
    [
        ([], 0),
        (["--device", "cuda"], 1),
        (["--device", "cpu"], 0),
        (["--device", "cuda:0", "--engine-gpus", "0.5"], 0.5),
    ],
)
def test_an_engine_on_cuda_gets_a_gpu(arguments: list[str], num_gpus: float, tmp_path: Path) -> None:
    args = build_parser(["serve"]).parse_args(["serve", "--port", "1", *arguments])
    assert serve.service_config(args, tmp_path).engine_gpus == num_gpus
