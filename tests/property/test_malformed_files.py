"""Whatever stands in a file or an option: what comes back is a value that can be used, or one line."""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from sidecast.checkpoints.checkpoint import Checkpoint
from sidecast.checkpoints.opening import open_checkpoint
from sidecast.checkpoints.series import check_series
from sidecast.checkpoints.staging import manifest_of
from sidecast.checkpoints.steps import known_steps
from sidecast.errors import ConfigError
from sidecast.graphs import build_topology
from sidecast.manifest import ModelManifest
from tests.support.refusals import one_line
from tests.support.symmetric_models import SMALL_MODELS

deterministic = settings(derandomize=True, deadline=None, max_examples=150, database=None)

PLAIN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**400, -(2**63), 2**63, 1.5, float("nan"), float("inf"), -0.0]),
    st.sampled_from(["", "x", "..", "64", "\x00", "\ud800", "a" * 5000, "\x1b[2J"]),
)
JSON = st.recursive(
    PLAIN,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["w", "", "é"]), inner)),
    max_leaves=4,
)
TENSORS = st.sampled_from(
    [
        torch.zeros(0),
        torch.ones(()),
        torch.ones(3, 2),
        torch.ones(2, 3),
        torch.ones(6, dtype=torch.int64),
        torch.ones(7).to(torch.float8_e4m3fn),
        torch.ones(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        torch.ones(6, device="meta"),
        torch.quantize_per_tensor(torch.ones(6), 0.1, 0, torch.qint8),
        torch.nn.Parameter(torch.ones(6)),
    ]
)
PICKLED = st.one_of(JSON, TENSORS, st.lists(TENSORS, max_size=2), st.dictionaries(st.integers(0, 2), PLAIN, min_size=1))


def read_all(checkpoint: Checkpoint) -> None:
    for name, stored in checkpoint.tensors.items():
        tensor = stored.read()
        assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype), name
    for alias, name in checkpoint.aliases.items():
        assert alias not in checkpoint.tensors
        assert name in checkpoint.tensors
    known_steps([checkpoint])
    manifest_of(checkpoint, None)


def module_state() -> dict[str, Tensor]:
    weights = {
        "a.weight": torch.arange(6.0).view(2, 3),
        "a.bias": torch.ones(2),
        "f": torch.ones(3),
        "b": torch.ones(1),
    }
    return weights | {"head": weights["a.weight"]}


def saved_by_stage(stage: int) -> dict[str, Any]:
    """Files of one DeepSpeed checkpoint of two ranks with a frozen parameter, a buffer and a tied name."""
    module = module_state()
    shapes = [{name: module[name].shape for name in ("a.weight", "a.bias")}]
    model: dict[str, Any] = {
        "module": module,
        "buffer_names": ["b"],
        "param_shapes": shapes,
        "shared_params": {"head": "a.weight"},
        "global_steps": 5,
    }
    if stage == 0:
        flat = torch.cat([module["a.weight"].flatten(), module["a.bias"]])
        rounded = {name: tensor.bfloat16() for name, tensor in module.items()}
        rounded["head"] = rounded["a.weight"]
        model |= {"module": rounded, "param_shapes": None, "optimizer": {"fp32_groups_flat": [flat]}}
        return {"mp_rank_00_model_states.pt": model}
    optimizer: dict[str, Any] = {"zero_stage": stage, "partition_count": [2], "param_alignment_paddings": [[0, 0]]}
    files: dict[str, Any] = {}
    for rank in range(2):
        if stage == 3:
            del optimizer["param_alignment_paddings"]
            optimizer = {"zero_stage": 3, "partition_count": 2, "fp32_flat_groups": [torch.arange(4.0)]}
            model = {
                **model,
                "module": {"b": module["b"], "a.weight": torch.zeros(0)},
                "frozen_param_shapes": {"f": torch.Size([3])},
                "frozen_param_fragments": {"f": torch.ones(2)},
            }
            optimizer["param_alignment_paddings"] = None
            files[f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"] = model
        else:
            flat = torch.cat([module["a.weight"].flatten(), module["a.bias"]])
            optimizer = {**optimizer, "single_partition_of_fp32_groups": [flat[4 * rank : 4 * rank + 4].clone()]}
            files["mp_rank_00_model_states.pt"] = model
        files[f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = {"optimizer_state_dict": optimizer}
    return copy.deepcopy(files) if stage == 3 else files


def universal() -> dict[str, Any]:
    files = saved_by_stage(2)
    model = files["mp_rank_00_model_states.pt"]
    masters = {f"zero/{name}/fp32.pt": {"param": model["module"][name]} for name in ("a.weight", "a.bias")}
    return {"mp_rank_00_model_states.pt": model, **masters}


DEEPSPEED: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"stage {stage}": lambda stage=stage: saved_by_stage(stage) for stage in (0, 2, 3)},
    "universal": universal,
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in nested dictionaries and lists."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


def changed(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with another value at one place; without it if that is ``...``."""
    value = copy.copy(value)
    if len(path) > 1:
        value[path[0]] = changed(value[path[0]], path[1:], new)
    elif new is ...:
        del value[path[0]]
    else:
        value[path[0]] = new
    return value


def write_deepspeed(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(content, folder / name)


@pytest.mark.parametrize("kind", DEEPSPEED)
def test_deepspeed_files_of_this_test_are_whole(kind: str, tmp_path: Path) -> None:
    write_deepspeed(tmp_path, DEEPSPEED[kind]())
    checkpoint = open_checkpoint(tmp_path)
    read_all(checkpoint)
    assert {name for name, stored in checkpoint.tensors.items() if stored.trainable} == {"a.weight", "a.bias"}
    assert checkpoint.aliases == {"head": "a.weight"}


@pytest.mark.parametrize("kind", DEEPSPEED)
@deterministic
@given(data=st.data(), new=st.one_of(PICKLED, st.just(...)))
def test_any_field_of_deepspeed(kind: str, data: st.DataObject, new: Any) -> None:
    files = DEEPSPEED[kind]()
    place = data.draw(st.sampled_from(list(places(files))))
    with TemporaryDirectory() as folder:
        try:
            write_deepspeed(Path(folder), changed(files, place, new))
        except (UnicodeEncodeError, NotImplementedError, OverflowError):
            return  # what torch cannot save
        with one_line():
            read_all(open_checkpoint(Path(folder)))


@deterministic
@given(data=st.data())
def test_any_damage_to_a_pickle(data: st.DataObject) -> None:
    saved = BytesIO()
    torch.save(saved_by_stage(0)["mp_rank_00_model_states.pt"], saved)
    archive = zipfile.ZipFile(saved)
    parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))
    place = data.draw(st.integers(0, len(parts[pickled]) - 1))
    if data.draw(st.booleans()):
        parts[pickled] = parts[pickled][:place]
    else:
        byte = data.draw(st.integers(0, 255))
        parts[pickled] = parts[pickled][:place] + bytes([byte]) + parts[pickled][place + 1 :]
    with TemporaryDirectory() as folder:
        with zipfile.ZipFile(Path(folder) / "mp_rank_00_model_states.pt", "w") as damaged:
            for name, content in parts.items():
                damaged.writestr(name, content)
        with one_line():
            read_all(open_checkpoint(Path(folder)))


@deterministic
@given(data=st.data(), new=st.one_of(JSON, st.just(...)))
def test_any_header_of_safetensors(data: st.DataObject, new: Any) -> None:
    tensors = save({"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2, dtype=torch.bfloat16)}, {"step": "5"})
    length = int.from_bytes(tensors[:8], "little")
    header = json.loads(tensors[8 : 8 + length])
    place = data.draw(st.sampled_from(list(places(header))))
    text = json.dumps(changed(header, place, new)).encode()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + tensors[8 + length :])
        with one_line():
            read_all(open_checkpoint(path))


JSON_FILES = {
    "model.safetensors.index.json": {"metadata": {"total_size": 32}, "weight_map": {"w": "a.safetensors"}},
    "trainer_state.json": {"global_step": 5, "epoch": 1.0},
    "config.json": {"model_type": "llama", "tie_word_embeddings": True, "quantization_config": None},
    "adapter_config.json": {"base_model_name_or_path": "x", "lora_alpha": 8},
}


@pytest.mark.parametrize("name", JSON_FILES)
@deterministic
@given(data=st.data(), new=st.one_of(JSON, st.just(...)))
def test_any_field_of_a_json_file(name: str, data: st.DataObject, new: Any) -> None:
    place = data.draw(st.sampled_from([(), *places(JSON_FILES[name])]))
    content = changed(JSON_FILES[name], place, new) if place else new if new is not ... else None
    with TemporaryDirectory() as base:
        folders = [Path(base) / "checkpoint-5", Path(base) / "checkpoint-6"]
        for number, folder in enumerate(folders):
            folder.mkdir()
            key = "base_model.model.w" if name == "adapter_config.json" else "w"
            save_file({key: torch.ones(2, 4) * number}, folder / "a.safetensors")
            target = "adapter_model.safetensors" if name == "adapter_config.json" else "model.safetensors"
            if "index" not in name:
                (folder / "a.safetensors").rename(folder / target)
            else:
                (folder / name).write_text(json.dumps(JSON_FILES[name]))
        (folders[0] / name).write_text(json.dumps(content))
        with one_line():
            checkpoints = [open_checkpoint(folder) for folder in folders]
            check_series(checkpoints)
            for checkpoint in checkpoints:
                read_all(checkpoint)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "\xff", '{"a": 1' + "0" * 5000 + "}", ""])
def test_json_that_no_parser_takes(text: str, tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.json cannot be read as JSON") as refusal:
        open_checkpoint(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("tag", ["a" * 5000, "a\x00b", "..", ".", "/etc", "a\nb", ""])
def test_any_latest_file(tag: str, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text(tag)
    with pytest.raises(ConfigError, match="which is no DeepSpeed checkpoint in that folder") as refusal:
        open_checkpoint(tmp_path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


_MANIFESTS: dict[str, ModelManifest] = {}
FAMILIES = ("llama", "mixtral", "gpt2", "bert_mlm", "vit")


@pytest.mark.parametrize("family", FAMILIES)
@deterministic
@given(data=st.data(), new=st.one_of(JSON, st.just(...)))
def test_any_field_of_a_models_configuration(family: str, data: st.DataObject, new: Any) -> None:
    if family not in _MANIFESTS:
        _MANIFESTS[family] = SMALL_MODELS[family]().manifest
    manifest = _MANIFESTS[family]
    key = data.draw(st.sampled_from(sorted(manifest.config)))
    config = changed(dict(manifest.config), (key,), new)
    with one_line():
        build_topology(ModelManifest(manifest.parameters, config, manifest.aliases), None)
