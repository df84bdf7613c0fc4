"""What ``--probe`` may name, and what a function of the operator's may answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest
from sidecast.nowcaster_service.probing.evaluation import ProbeRequest, Probing
from sidecast.nowcaster_service.probing.source import read_source

MANIFEST = ModelManifest.from_shapes([("a", (2, 3)), ("b", (4,))], {"model_type": "toy"})
VALUES = np.arange(10, dtype=np.float32)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (np.zeros((2, 3, 4), np.int64), r"holds int64 of shape \(2, 3, 4\); allowed: integers, in one row or"),
        (np.zeros(8), r"holds float64 of shape \(8,\); allowed: integers"),
        (np.zeros((4, 1), np.int64), r"token ids of shape \(4, 1\); allowed: 2 or more in a row, at most 16777216"),
        (np.zeros(0, np.int64), r"token ids of shape \(0,\)"),
        (np.array([1, -1]), "token ids from -1 to 1; allowed: 0 to"),
        (np.array([1, 1 << 31]), "token ids from 1 to 2147483648; allowed: 0 to"),
        (np.array([{"code": 1}], dtype=object), "cannot be read: "),
    ],
)
def test_tokens_that_are_none_are_refused(tmp_path: Path, tokens: np.ndarray, reason: str) -> None:
    np.save(tmp_path / "probe.npy", tokens, allow_pickle=True)
    with pytest.raises(ConfigError, match=f"--probe {tmp_path}/probe.npy .*{reason}"):
        read_source(str(tmp_path / "probe.npy"), None)


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        ("tokens.bin", "allowed: a file .npy, .safetensors or .txt, or MODULE:FUNCTION"),
        ("nothing_of_that_name:loss", "there is no module nothing_of_that_name here"),
        ("json:loads; import os", "allowed: a file"),
        ("text.txt", "--probe-tokenizer is for .txt files, which need it"),
        ("none.npy", "cannot be read: "),
    ],
)
def test_what_names_no_probe_is_refused(probe: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_source(probe, None)


def test_safetensors_hold_one_tensor_of_any_name(tmp_path: Path) -> None:
    path = str(tmp_path / "probe.safetensors")
    save_file({"ids": np.array([[1, 2], [3, 4]], np.int32)}, path)
    rows = read_source(path, None)
    assert rows.tokens_NT is not None
    assert (rows.tokens_NT.tolist(), rows.is_text) == ([[1, 2], [3, 4]], False)
    save_file({"ids": np.array([1, 2, 3, 4], np.int32)}, path)
    text = read_source(path, None)
    assert text.is_text
    # They are other losses.
    assert rows.name != text.name
    save_file({"ids": np.zeros(4, np.int32), "more": np.zeros(4, np.int32)}, path)
    with pytest.raises(ConfigError, match="holds 2 tensors; allowed: one, of token ids"):
        read_source(path, None)


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"model_type": "llama", "vocab_size": 8}, ""),
        ({"model_type": "nested", "text_config": {"vocab_size": 8}}, ""),
        ({"model_type": "llama", "vocab_size": 7}, "the probe's token ids reach 7; the model's vocab_size is 7"),
        (
            {"model_type": "vit"},
            "the probe is one of tokens, and the model's configuration has no model_type and",
        ),
        ({}, "the probe is one of tokens"),
    ],
)
def test_a_model_that_tokens_say_nothing_of_is_told_from_its_configuration(
    tmp_path: Path, config: dict[str, Any], fault: str
) -> None:
    np.save(tmp_path / "probe.npy", np.arange(8))
    found = read_source(str(tmp_path / "probe.npy"), None).fault(config)
    assert found.startswith(fault)
    assert bool(found) == bool(fault)


def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Any:
    (tmp_path / "own_probe.py").write_text(f"def loss(weights, config):\n    {body}\n")
    (tmp_path / "vector").write_bytes(VALUES.tobytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_probe", raising=False)
    probing = Probing(read_source("own_probe:loss", None), "cpu")
    return probing.evaluate(ProbeRequest(manifest_json=MANIFEST.to_json(), vector_path=tmp_path / "vector"))


@pytest.mark.parametrize(
    ("body", "loss"),
    [
        ("return float(weights['b'].sum()) + len(config)", float(VALUES[6:].sum()) + 1),
        ("return weights['a'][1, 2] * 2", 2 * float(VALUES[5])),
        ("import torch; assert list(weights) == ['a', 'b']; return torch.tensor([3])", 3.0),
        ("return 4", 4.0),
    ],
)
def test_a_function_is_given_weights_by_name_and_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, loss: float
) -> None:
    answer = answers(tmp_path, monkeypatch, body)
    assert (answer.refusal, answer.loss) == ("", loss)
    # The file is the service's.
    assert torch.equal(torch.from_numpy(np.fromfile(tmp_path / "vector", np.float32)), torch.from_numpy(VALUES))


@pytest.mark.parametrize(
    ("body", "refusal", "is_hopeless"),
    [
        ("return weights['b']", r"own_probe:loss gave a tensor of shape (4,); allowed: one number", True),
        ("return 'low'", "own_probe:loss gave 'low'; allowed: one number", True),
        ("return None", "own_probe:loss gave None; allowed: one number", True),
        ("raise KeyError('c')", "the probe failed: KeyError: 'c'", True),
        ("weights['a'].zero_(); return float('nan')", "the loss is nan", False),
        ("return float('-inf')", "the loss is -inf", False),
    ],
)
def test_what_a_function_does_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, refusal: str, is_hopeless: bool
) -> None:
    answer = answers(tmp_path, monkeypatch, body)
    assert (answer.refusal, answer.is_hopeless) == (refusal, is_hopeless)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "vector", np.float32), VALUES)
