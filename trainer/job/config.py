"""What a training run is told, checked before anything is built.

The job reads one file, a DeepSpeed configuration. Everything that DeepSpeed knows (optimizer, ZeRO, precision, batch,
accumulation, clipping) stays in DeepSpeed's own keys; the rest of the run is the top-level section ``training``; the
nowcaster's is ``nowcaster``, which its hook reads and checks.
"""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from sidecast.errors import ConfigError
from sidecast.trainer.job.schedules import ScheduleConfig, lr_ratio

OWN_SECTIONS = ("training", "nowcaster")
# The engine would build a second scheduler from it and drop it silently, because the job passes its own.
REFUSED_SECTIONS = {"scheduler": "use training.schedule, whose kinds are constant, cosine and wsd"}

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which causal language model is trained.

    Attributes:
        source: A Hugging Face model directory (its weights are loaded unless ``from_scratch``), a ``config.json``
            (random weights), or None for a Llama of the dimensions below.
        from_scratch: Take only the configuration from a ``source`` directory.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the SwiGLU.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Query heads; must divide ``hidden_size``.
        num_key_value_heads: Key and value heads (grouped-query attention); must divide the query heads.
        tie_word_embeddings: Use the embedding as output projection.
    """

    source: str | None = None
    from_scratch: bool = False
    hidden_size: int = 96
    intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for name in sizes:
            _require_at_least(f"training.model.{name}", getattr(self, name), 1)
        head_size, remainder = divmod(self.hidden_size, self.num_attention_heads)
        if remainder or head_size % 2:
            raise ConfigError(
                f"training.model.hidden_size is {self.hidden_size}; it must be an even multiple of "
                f"num_attention_heads, {self.num_attention_heads} (rotary positions pair the features of a head)"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"training.model.num_key_value_heads is {self.num_key_value_heads}; it must divide "
                f"num_attention_heads, {self.num_attention_heads}"
            )
        if self.from_scratch and self.source is None:
            raise ConfigError("training.model.from_scratch is true, but training.model.source names no model directory")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is trained on, and how it is cut.

    Attributes:
        corpus: ``stdlib`` (the running interpreter's standard library), the path of a text file or of a directory of
            text files, or ``hf:NAME`` for a Hugging Face dataset (name on the hub or local path).
        split: Split of the Hugging Face dataset.
        text_column: Its column with the text.
        tokenizer: ``bytes`` (vocabulary 256), or a Hugging Face tokenizer (name or directory).
        sequence_length: Tokens that one sample predicts.
        validation_fraction: Share of the tokens that is held out.
        validation_sequences: Held-out samples that one validation reads, over all ranks.
    """

    corpus: str = "stdlib"
    split: str = "train"
    text_column: str = "text"
    tokenizer: str = "bytes"
    sequence_length: int = 64
    validation_fraction: float = 0.05
    validation_sequences: int = 256

    def __post_init__(self) -> None:
        _require_at_least("training.data.sequence_length", self.sequence_length, 1)
        _require_at_least("training.data.validation_sequences", self.validation_sequences, 1)
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(
                f"training.data.validation_fraction is {self.validation_fraction}; "
                "it must lie between 0 and 1, both excluded"
            )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run.

    Attributes:
        run_dir: Where metrics, checkpoints and the resolved configuration are written.
        steps: Optimizer steps of the whole run, also of a resumed one.
        seed: Decides initial weights, data order and dropout.
        log_interval_steps: One metrics line every so many steps.
        validation_interval_steps: One validation every so many steps, and one at the end.
        checkpoint_interval_steps: One checkpoint every so many steps; None for none.
        resume: Directory of checkpoints to continue from (its newest), usually ``<run_dir>/checkpoints``.
        model: What is trained.
        data: What it is trained on.
        schedule: How the learning rate moves.
    """

    run_dir: str = "runs/train"
    steps: int = 1000
    seed: int = 0
    log_interval_steps: int = 10
    validation_interval_steps: int = 250
    checkpoint_interval_steps: int | None = None
    resume: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)

    def __post_init__(self) -> None:
        for name in ("steps", "log_interval_steps", "validation_interval_steps"):
            _require_at_least(f"training.{name}", getattr(self, name), 1)
        _require_at_least("training.seed", self.seed, 0)
        if self.checkpoint_interval_steps is not None:
            _require_at_least("training.checkpoint_interval_steps", self.checkpoint_interval_steps, 1)
        lr_ratio(self.schedule, self.steps)


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """A checked configuration.

    Attributes:
        training: The job's own settings.
        deepspeed: What is passed to ``deepspeed.initialize``, the section ``nowcaster`` included.
    """

    training: TrainingConfig
    deepspeed: Mapping[str, Any]


def load_config(name_or_path: str, overrides: Sequence[tuple[str, Any]] = ()) -> JobConfig:
    """Reads, overrides and checks a configuration.

    Args:
        name_or_path: A JSON file, or the name of a configuration that ships with the package (``default``, ``demo``).
        overrides: Pairs of a dotted key, as in ``zero_optimization.stage``, and its value; later ones win.

    Raises:
        ConfigError: The file cannot be read, a key is unknown or a value not allowed.
    """
    sections = _read(name_or_path)
    for key, value in overrides:
        _assign(sections, key, value)
    for key in sections:
        if key in REFUSED_SECTIONS:
            raise ConfigError(f"section {key!r} in {name_or_path} is not read by this job; {REFUSED_SECTIONS[key]}")
        if key not in OWN_SECTIONS and (close := difflib.get_close_matches(key, OWN_SECTIONS, n=1, cutoff=0.75)):
            raise ConfigError(f"unknown section {key!r} in {name_or_path}; did you mean {close[0]!r}?")
    if not isinstance(sections.get("optimizer"), dict):
        raise ConfigError(
            f"section 'optimizer' in {name_or_path} is {json.dumps(sections.get('optimizer'))}; "
            "it must be DeepSpeed's object of an optimizer's type and params"
        )
    training = parse_settings(TrainingConfig, sections.pop("training", {}), "training")
    nowcaster = sections.get("nowcaster")
    if isinstance(nowcaster, dict):
        # The horizon schedule spans the run, whose length only the job knows.
        if nowcaster.get("max_steps") is None:
            nowcaster["max_steps"] = training.steps
    elif nowcaster is not None:
        raise ConfigError(f"section 'nowcaster' is {nowcaster!r}; it must be an object of settings")
    return JobConfig(training=training, deepspeed=sections)


def parse_settings(settings: type[Settings], values: Any, section: str) -> Settings:
    """Builds a settings dataclass from plain JSON values.

    Args:
        settings: A dataclass whose fields are bool, int, float, str, optional ones of these, or settings themselves.
        values: The JSON object.
        section: Its dotted name, for messages.

    Raises:
        ConfigError: A key is unknown, or a value is of the wrong type or not allowed.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"section {section!r} is {values!r}; it must be an object of settings")
    assert is_dataclass(settings)
    names = [entry.name for entry in fields(settings)]
    for key in values:
        if key not in names:
            raise ConfigError(f"unknown key '{section}.{key}'; allowed are {', '.join(names)}")
    hints = get_type_hints(settings)
    return settings(**{key: _coerce(hints[key], value, f"{section}.{key}") for key, value in values.items()})


def _coerce(hint: Any, value: Any, key: str) -> Any:
    if isinstance(hint, type) and is_dataclass(hint):
        return parse_settings(hint, value, key)
    allowed = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    # bool is an int to Python, but 'true' steps are a mistake.
    if type(value) in allowed:
        return value
    if float in allowed and type(value) is int:
        return float(value)
    names = ["null" if kind is NoneType else kind.__name__ for kind in allowed]
    raise ConfigError(f"{key} is {json.dumps(value)}; it must be of type {' or '.join(names)}")


def _read(name_or_path: str) -> dict[str, Any]:
    shipped = {Path(entry.name).stem: entry for entry in resources.files(__package__).joinpath("configs").iterdir()}
    try:
        text = shipped[name_or_path].read_text() if name_or_path in shipped else Path(name_or_path).read_text()
        sections = json.loads(text)
    except OSError as error:
        raise ConfigError(
            f"configuration {name_or_path!r} cannot be read ({error.strerror}); "
            f"give a JSON file, or one of {', '.join(sorted(shipped))}"
        ) from error
    except ValueError as error:
        raise ConfigError(f"configuration {name_or_path!r} is not valid JSON: {error}") from error
    if not isinstance(sections, dict):
        raise ConfigError(f"configuration {name_or_path!r} must be a JSON object, as DeepSpeed's is")
    return sections


def _assign(sections: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    target = sections
    for depth, parent in enumerate(parents, start=1):
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise ConfigError(f"cannot set {key!r}: {'.'.join(parents[:depth])!r} is {target!r}, not a section")
    target[last] = copy.deepcopy(value)


def _require_at_least(key: str, value: int, minimum: int) -> None:
    if value < minimum:
        raise ConfigError(f"{key} is {value}; it must be at least {minimum}")
