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
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sidecast.assignments import parse_assignment
from sidecast.errors import ConfigError
from sidecast.trainer.job.schedules import ScheduleConfig, lr_ratio
from sidecast.trainer.settings import read_settings, require

OWN_SECTIONS = ("training", "nowcaster")
# The engine would build a second scheduler from it and drop it silently, because the job passes its own.
REFUSED_SECTIONS = {"scheduler": "use training.schedule, whose kinds are constant, cosine and wsd"}


@dataclass(frozen=True, kw_only=True)
class CausalLMConfig:
    """Which causal language model is trained."""

    source: str | None = None
    """A Hugging Face model directory (its weights are loaded unless ``from_scratch``), a ``config.json`` (random
    weights), or None: a Llama of the dimensions below."""
    from_scratch: bool = False
    """Take only the configuration from a ``source`` directory."""
    hidden_size: int = 96
    """Width of the residual stream."""
    intermediate_size: int = 256
    """Width of the SwiGLU."""
    num_hidden_layers: int = 4
    """Number of blocks."""
    num_attention_heads: int = 4
    """Query heads; must divide ``hidden_size``."""
    num_key_value_heads: int = 2
    """Key and value heads (grouped-query attention); must divide the query heads."""
    tie_word_embeddings: bool = True
    """Use the embedding as output projection."""

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        for name in sizes:
            _require_at_least(f"training.model.{name}", getattr(self, name), 1)
        head_size, remainder = divmod(self.hidden_size, self.num_attention_heads)
        require(
            "training.model.hidden_size",
            self.hidden_size,
            remainder == 0 and head_size % 2 == 0,
            f"an even multiple of num_attention_heads, {self.num_attention_heads} (rotary positions pair the features "
            "of a head)",
        )
        require(
            "training.model.num_key_value_heads",
            self.num_key_value_heads,
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"a divisor of num_attention_heads, {self.num_attention_heads}",
        )
        require(
            "training.model.from_scratch",
            self.from_scratch,
            not self.from_scratch or self.source is not None,
            "false, since training.model.source names no model directory",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text is trained on, and how it is cut."""

    corpus: str = "stdlib"
    """``stdlib`` (the running interpreter's standard library), the path of a text file or of a directory of text files,
    or ``hf:NAME`` for a Hugging Face dataset (name on the hub or local path)."""
    split: str = "train"
    """Split of the Hugging Face dataset."""
    text_column: str = "text"
    """Its column with the text."""
    tokenizer: str = "bytes"
    """``bytes`` (vocabulary 256), or a Hugging Face tokenizer (name or directory)."""
    sequence_length: int = 64
    """Tokens that one sample predicts."""
    validation_fraction: float = 0.05
    """Share of the tokens that is held out."""
    validation_sequences: int = 256
    """Held-out samples that one validation reads, over all ranks."""

    def __post_init__(self) -> None:
        _require_at_least("training.data.sequence_length", self.sequence_length, 1)
        _require_at_least("training.data.validation_sequences", self.validation_sequences, 1)
        fraction = self.validation_fraction
        require("training.data.validation_fraction", fraction, 0.0 < fraction < 1.0, "more than 0, less than 1")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """One training run."""

    run_dir: str = "runs/train"
    """Where metrics, checkpoints and the resolved configuration are written."""
    steps: int = 1000
    """Optimizer steps of the whole run, also of a resumed one."""
    seed: int = 0
    """Decides initial weights, data order and dropout."""
    log_interval_steps: int = 10
    """One metrics line every so many steps."""
    validation_interval_steps: int = 250
    """One validation every so many steps, and one at the end."""
    checkpoint_interval_steps: int | None = None
    """One checkpoint every so many steps; None: none."""
    resume: str | None = None
    """Directory of checkpoints to continue from (its newest), usually ``<run_dir>/checkpoints``."""
    model: CausalLMConfig = field(default_factory=CausalLMConfig)
    """What is trained."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it is trained on."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """How the learning rate moves."""

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
        name_or_path: A JSON file, or the name of a configuration that ships with the package (``default``, ``demo``,
            ``demo-jumps``).
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
    training = read_settings(TrainingConfig, sections.pop("training", {}), "training")
    nowcaster = sections.get("nowcaster")
    if nowcaster is not None:
        require("nowcaster", nowcaster, isinstance(nowcaster, dict), "an object")
        # The horizon schedule of jumps spans the run, whose length only the job knows.
        if nowcaster.get("policy", "jump") == "jump" and nowcaster.get("max_steps") is None:
            nowcaster["max_steps"] = training.steps
    return JobConfig(training=training, deepspeed=sections)


def parse_override(text: str) -> tuple[str, Any]:
    """A dotted key and its value from ``KEY=VALUE``; the value is JSON, or else text.

    Raises:
        ConfigError: The text is not of that form.
    """
    assignment = parse_assignment(text)
    if assignment is None:
        raise ConfigError(f"{text!r} is not of the form KEY=VALUE")
    return assignment


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


def _require_at_least(name: str, value: int, minimum: int) -> None:
    require(name, value, value >= minimum, f"{minimum} or more")
