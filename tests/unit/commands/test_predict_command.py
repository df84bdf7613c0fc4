"""``sidecast predict`` on small safetensors files: results, and one clear line for every mistake."""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sidecast.checkpoints.opening import open_checkpoint
from sidecast.checkpoints.staging import manifest_of, stage_history
from sidecast.commands import predict
from sidecast.errors import ConfigError, NoRoomError


def states(offset: float) -> dict[str, Tensor]:
    return {
        "layers.0.weight": torch.arange(6.0).view(2, 3) + offset,
        "layers.1.weight": torch.ones(2, 3, dtype=torch.bfloat16) * (1 + offset),
        "frozen": torch.full((3,), 7.0),
        "bn.running_mean": torch.full((2,), offset),
        "count": torch.tensor(int(offset)),
        "empty": torch.zeros(0),
        "mask": torch.tensor([True, False, True]),
    }


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    paths = []
    for step, offset in ((200, 0.0), (400, 1.0), (600, 2.0)):
        path = tmp_path / f"step_{step}.safetensors"
        save_file(states(offset), path, metadata={"format": "pt", "run": "a"})
        paths.append(str(path))
    return paths


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Path]:
    def run(*arguments: str) -> Path:
        parser = argparse.ArgumentParser()
        predict.add_parser(parser.add_subparsers(required=True))
        out = tmp_path / "out"
        assert predict.run(parser.parse_args(["predict", *arguments, "--out", str(out)])) == 0
        return out

    return run


def test_adds_a_fraction_of_the_jump_and_leaves_the_rest(
    files: list[str], command: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = command(*files, "--horizon", "4", "--weight", "0.25")
    predicted, newest = load_file(out / "model.safetensors"), states(2.0)
    changed = {"layers.0.weight", "layers.1.weight"}
    for name, tensor in newest.items():
        assert predicted[name].dtype == tensor.dtype
        # The states rise by 1 per interval: a quarter of four intervals is 1.
        assert torch.equal(predicted[name], tensor + 1 if name in changed else tensor), name
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "run": "a"}
    text = capsys.readouterr().out
    assert "horizon 4 intervals = 800 steps, weight 0.25" in text
    jump = (12 / (newest["layers.0.weight"].square().sum() + 6 * 9)).sqrt().item()
    assert f"{'layers.*.weight':<15}      2  {jump:14.3e}" in text
    assert str(out / "model.safetensors") in text
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "out",
        *sorted(Path(file).name for file in files),
    ], "temporary files are left"


def test_writes_the_wanted_dtype_and_config(files: list[str], command: Callable[..., Path], tmp_path: Path) -> None:
    config = tmp_path / "given.json"
    config.write_text(json.dumps({"model_type": "llama", "dtype": "float32"}))
    out = command(*files, "--dtype", "bfloat16", "--config", str(config))
    predicted = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in predicted.values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert predicted["count"].dtype == torch.int64
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama", "dtype": "bfloat16"}


def test_no_predictor_can_change_what_never_changed(files: list[str], tmp_path: Path) -> None:
    checkpoints = [open_checkpoint(Path(file)) for file in files]
    staged = stage_history(checkpoints, manifest_of(checkpoints[-1], None), tmp_path)
    staged.delta.fill_(1.0)
    assert {name for name in checkpoints[-1].tensors if staged.change_of(name) is not None} == {
        "layers.0.weight",
        "layers.1.weight",
    }


def test_force_overwrites(files: list[str], command: Callable[..., Path]) -> None:
    out = command(*files)
    with pytest.raises(ConfigError, match="exists and is not empty; choose a new folder, or overwrite with --force"):
        command(*files)
    before = load_file(out / "model.safetensors")["layers.0.weight"]
    after = load_file(command(*files, "--horizon", "1", "--force") / "model.safetensors")["layers.0.weight"]
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--horizon", "0"], "--horizon is 0; it must be at least 1 interval"),
        (["--weight", "0"], "--weight is 0; it must be above 0 and at most 1"),
        (["--weight", "nan"], "--weight is nan; it must be above 0 and at most 1"),
        (["--predictor", "oracle"], "predictor is 'oracle'; allowed: .*linear"),
        (["--weights", "w.pt"], "predictor 'linear' takes no weights, but the weights file w.pt was given"),
        (["--option", "fast"], "--option is 'fast'; KEY=VALUE is needed"),
        (["--scratch", "/nonexistent"], "--scratch /nonexistent is no folder"),
        (["--config", "/nonexistent"], "/nonexistent cannot be read as JSON"),
        (
            ["--dtype", "float16", "--horizon", "100000"],
            "the nowcast of tensor 'layers.0.weight' holds NaN or infinity",
        ),
    ],
)
def test_a_bad_option_is_one_line(
    files: list[str], command: Callable[..., Path], arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        command(*files, *arguments)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_refuses_a_single_checkpoint(files: list[str], command: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="1 checkpoint given; a nowcast needs at least 2"):
        command(files[0])


def test_refuses_wrong_predictor_weights(files: list[str], command: Callable[..., Path], tmp_path: Path) -> None:
    weights = tmp_path / "w.pt"
    torch.save({"something": torch.ones(2)}, weights)
    with pytest.raises(ConfigError, match=r"w\.pt"):
        command(*files, "--predictor", "nino_plain", "--weights", str(weights))


def test_says_early_how_many_checkpoints_a_predictor_needs(
    files: list[str], command: Callable[..., Path], nino_data: Path
) -> None:
    with pytest.raises(ConfigError, match="3 checkpoints given; predictor 'nino_plain' needs exactly 5"):
        command(*files, "--predictor", "nino_plain", "--weights", str(nino_data / "nino_no_posw.pt"))


def test_names_the_first_tensor_that_differs(files: list[str], command: Callable[..., Path]) -> None:
    tensors = states(1.0)
    save_file({**tensors, "frozen": torch.ones(4)}, files[1])
    with pytest.raises(ConfigError, match=r"tensor 'frozen' has shape \(3,\) in .*600.* but \(4,\) in .*400"):
        command(*files)
    del tensors["layers.1.weight"]
    save_file(tensors, files[1])
    with pytest.raises(ConfigError, match=r"tensor 'layers.1.weight' is in .*600.* but not in .*400"):
        command(*files)
    save_file({**states(1.0), "new": torch.ones(1)}, files[1])
    with pytest.raises(ConfigError, match=r"tensor 'new' is in .*400.* but not in .*600"):
        command(*files)


def test_refuses_uneven_and_unordered_steps(files: list[str], command: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="steps are 600, 400, 200; give them oldest first"):
        command(*reversed(files))
    late = tmp_path / "step_700.safetensors"
    shutil.copyfile(files[2], late)
    with pytest.raises(ConfigError, match="steps are 200, 400, 700; they must be equally spaced"):
        command(*files[:2], str(late))


def test_names_without_steps_are_taken_as_given(files: list[str], command: Callable[..., Path], tmp_path: Path) -> None:
    renamed = [tmp_path / name for name in ("loss-2.31.safetensors", "loss-2.17.safetensors", "last.safetensors")]
    for file, path in zip(files, renamed, strict=True):
        os.rename(file, path)
    predicted = load_file(command(*map(str, renamed), "--horizon", "1") / "model.safetensors")
    assert torch.equal(predicted["layers.0.weight"], states(3.0)["layers.0.weight"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_the_tensor_that_is_not_finite(files: list[str], command: Callable[..., Path], value: float) -> None:
    tensors = states(1.0)
    tensors["layers.1.weight"][1, 2] = value
    save_file(tensors, files[1])
    with pytest.raises(ConfigError, match=r"tensor 'layers.1.weight' of .*step_400.safetensors holds NaN or infinity"):
        command(*files)


def test_refuses_scratch_without_room(
    files: list[str], command: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 0, 100))
    with pytest.raises(ConfigError, match=r"3 states needs .* GiB of scratch space; .* has 0.00 GiB free .*--scratch"):
        command(*files)


def test_refuses_scratch_that_lost_its_room_meanwhile(
    files: list[str], command: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(NoRoomError, match=r"no room for \d+ bytes at .*state_0\.bin: No space left on device"):
        command(*files)
    assert sorted(tmp_path.iterdir()) == before


def test_never_writes_over_an_input(files: list[str], tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    predict.add_parser(parser.add_subparsers(required=True))
    with pytest.raises(ConfigError, match=r"is where checkpoint .* lies; choose a new folder"):
        predict.run(parser.parse_args(["predict", *files, "--out", str(tmp_path), "--force"]))
