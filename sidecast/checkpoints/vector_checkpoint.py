"""A parameter vector in a file as a checkpoint, for the writer of checkpoints."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from sidecast.checkpoints.checkpoint import Checkpoint, CheckpointFormat, StoredTensor
from sidecast.checkpoints.transformers_models import model_of_config
from sidecast.errors import ConfigError, shown
from sidecast.manifest import ModelManifest, ParameterSpec, unwrapped_name

MAX_NAMED = 3


def checkpoint_of_vector(
    path: Path, manifest: ModelManifest, config: Mapping[str, Any] | None, metadata: Mapping[str, str]
) -> Checkpoint:
    """A model whose trained parameters lie one after another in a file.

    Args:
        path: File of P fp32 values.
        manifest: Of the model.
        config: The model's configuration in place of the manifest's; None for that one.
        metadata: Free-form strings for the written file.

    Returns:
        The checkpoint; without a configuration where neither is one of a known type of model.

    Raises:
        ConfigError: The configuration is of a model that has other tensors, or others besides: frozen ones, whose
            values are not in the vector.
    """
    config = dict(manifest.config) if config is None else config
    vector_P = torch.from_file(str(path), shared=False, size=manifest.num_elements, dtype=torch.float32)

    def stored(spec: ParameterSpec) -> StoredTensor:
        start = manifest.offsets[spec.fqn]
        return StoredTensor(
            shape=spec.shape,
            dtype=torch.float32,
            trainable=True,
            read=lambda: vector_P[start : start + spec.numel].view(spec.shape),
        )

    checkpoint = Checkpoint(
        path=path,
        format=CheckpointFormat.HUGGING_FACE,
        description="parameter vector",
        tensors={unwrapped_name(spec.fqn): stored(spec) for spec in manifest.parameters},
        aliases={unwrapped_name(alias): unwrapped_name(fqn) for alias, fqn in manifest.aliases.items()},
        config=config if "model_type" in config else None,
        metadata=metadata,
    )
    if checkpoint.config is not None:
        _check_complete(checkpoint, checkpoint.config)
    return checkpoint


def require_finite(checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Refuses a dtype that does not reach as far as the values do.

    Raises:
        ConfigError: A tensor would hold NaN or infinity.
    """
    for name, tensor in checkpoint.tensors.items():
        if not bool(torch.isfinite(tensor.read().to(dtype)).all()):
            raise ConfigError(
                f"tensor {shown(name)} has values beyond the range of {str(dtype)[6:]}; use another dtype"
            )


def _check_complete(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Compares with the model that a loader would make of the configuration, where transformers knows it."""
    try:
        expected = model_of_config(config, device="meta").state_dict()
    except ConfigError:
        # Of no type that is known here: its loader is somebody's own.
        return
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    shapes |= {alias: shapes[name] for alias, name in checkpoint.aliases.items()}
    missing = [name for name in expected if name not in shapes]
    if missing:
        raise ConfigError(
            f"the run does not train all of the model: {_named(missing)} would be missing; a checkpoint of the run "
            "has them"
        )
    unknown = [name for name in shapes if name not in expected]
    if unknown:
        raise ConfigError(f"the configuration is of a model without {_named(unknown)}; give the model's own (--config)")
    for name, shape in shapes.items():
        if tuple(expected[name].shape) != shape:
            raise ConfigError(
                f"{shown(name)} has shape {shape}, and {tuple(expected[name].shape)} by the configuration; give the "
                "model's own (--config)"
            )


def _named(names: Collection[str]) -> str:
    some = ", ".join(shown(name) for name in list(names)[:MAX_NAMED])
    return some if len(names) <= MAX_NAMED else f"{some} and {len(names) - MAX_NAMED} more"
