"""Why a file or folder is no checkpoint that can be read, and what to do: other formats by their names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

_STEP_FOLDER = re.compile(r"^(?:checkpoint|global_step|step)[-_]?(\d+)$")
_AS_SAFETENSORS = "load it and save it with save_pretrained or safetensors.torch.save_file"


def why_no_file(path: Path) -> str:
    """The refusal of a file that is no safetensors file."""
    problem = f"{path} is no checkpoint that can be read; of files only *.safetensors are"
    if path.suffix == ".gguf":
        return f"{problem}, and GGUF is quantised: give the model that it was made from"
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        return f"{problem}, because pickles can run code: {_AS_SAFETENSORS}"
    if path.suffix == ".distcp":
        return f"{problem}: it is one rank's part of a distributed checkpoint; give the folder, {path.parent}"
    return problem


def why_no_folder(path: Path) -> str:
    """The refusal of a folder that holds no checkpoint."""
    for names, reason in _KINDS:
        found = next((file for name in names for file in sorted(path.glob(name))), None)
        if found is not None and (text := reason(found)) is not None:
            return f"{path} {text}"
    return f"{path} holds neither model.safetensors (Hugging Face) nor *_model_states.pt (DeepSpeed)"


def _dangling(file: Path) -> str | None:
    if file.is_symlink() and not file.exists():
        return f"holds a link {file.name} to {file.readlink()}, which does not exist"
    return None


def _sharded_optimizer(file: Path) -> str:
    return f"holds {file.name} but no *_model_states.pt, which lies with it where DeepSpeed saves; copy both"


def _steps(file: Path) -> str | None:
    steps = [
        (int(match[1]), folder.name)
        for folder in file.parent.iterdir()
        if folder.is_dir() and (match := _STEP_FOLDER.match(folder.name)) is not None
    ]
    if not steps:
        return None
    return f"holds {len(steps)} checkpoints and is none itself; give them, up to the newest, {max(steps)[1]}"


def _pickled(file: Path) -> str:
    return f"holds pickled weights ({file.name}); {_AS_SAFETENSORS}"


# The first that is found counts: the more particular ones come first.
_KINDS: tuple[tuple[tuple[str, ...], Callable[[Path], str | None]], ...] = (
    (("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"), _dangling),
    (("*_model_states.pt", "*.safetensors"), _dangling),
    (
        ("*.distcp",),
        lambda file: (
            f"holds {file.name} but no .metadata, the index of a distributed checkpoint, which is written last: "
            "the save was not finished, or the file was not copied"
        ),
    ),
    (("*/.metadata",), lambda file: f"holds {file.parent.name}, a distributed checkpoint; give that folder"),
    (("*_optim_states.pt",), _sharded_optimizer),
    (
        ("snapshots",),
        lambda file: "is the Hugging Face cache of a model; give the folders below snapshots/, one for each commit",
    ),
    (
        ("model_index.json",),
        lambda file: "is a pipeline of diffusers; give a part's file, such as unet/diffusion_pytorch_model.safetensors",
    ),
    (
        ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model_fsdp.bin", "adapter_model.bin"),
        _pickled,
    ),
    (("checkpoint*", "global_step*", "step*"), _steps),
    (("consolidated*.pth", "*.ckpt", "*.pt", "*.pth", "*.bin"), _pickled),
    (("*.gguf",), lambda file: f"holds {file.name}, which is quantised: give the model that it was made from"),
    (
        ("*.safetensors",),
        lambda file: f"holds {file.name} but no model.safetensors; give that file itself, if it is the model",
    ),
)
