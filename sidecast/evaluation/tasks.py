"""The tasks: each a recipe of a model, a text and a size of batch, marked for what it may be used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from sidecast.errors import ConfigError
from sidecast.evaluation.models.gpt2 import Gpt2Config
from sidecast.evaluation.models.llama import LlamaConfig


@dataclass(frozen=True, kw_only=True)
class DataChange:
    """A text that takes the place of another in the middle of a run.

    Attributes:
        corpus: Name of the later text.
        step: Steps that still read the earlier one.
    """

    corpus: str
    step: int


@dataclass(frozen=True, kw_only=True)
class Task:
    """A recipe.

    Attributes:
        name: What it is called on the command line.
        use: ``tuning``: settings of methods may be chosen by it; ``held-out``: it only judges them.
        corpus: Name of the text.
        change: Another text for the later steps, and for what is validated after them; None: there is one text.
        model: The model's dimensions.
        batch_size: B, sequences in a batch.
        sequence_length: L, tokens that a sequence predicts.
        num_validation_sequences: Sequences of the held-out text that a loss is measured on, evenly spaced.
    """

    name: str
    use: Literal["tuning", "held-out"]
    corpus: str
    model: LlamaConfig | Gpt2Config
    batch_size: int = 32
    sequence_length: int = 64
    num_validation_sequences: int = 512
    change: DataChange | None = None

    @property
    def corpora(self) -> tuple[str, ...]:
        """Names of its texts, in the order in which they are read."""
        return (self.corpus,) if self.change is None else (self.corpus, self.change.corpus)

    def digest(self, corpus_digests: Sequence[str]) -> str:
        """Equal if and only if two runs have the same recipe and texts."""
        values = {**asdict(self), "family": type(self.model).__name__, "corpus_digest": "".join(corpus_digests)}
        if self.change is None:
            # What was run before there were changes keeps its name.
            del values["change"]
        # A task that changes its use is still the same task.
        del values["use"], values["name"]
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


_TASKS = (
    Task(name="python-bytes", use="tuning", corpus="python-source", model=LlamaConfig()),
    # The demo's model and batch.
    Task(name="python-bytes-small-batch", use="tuning", corpus="python-source", model=LlamaConfig(), batch_size=8),
    Task(
        name="python-bytes-gpt2",
        use="tuning",
        corpus="python-source",
        model=Gpt2Config(width=48, num_layers=3, num_heads=3),
    ),
    # For what watches a run: the loss rises at once, whatever the method.
    Task(
        name="python-then-english",
        use="tuning",
        corpus="python-source",
        change=DataChange(corpus="english", step=400),
        model=LlamaConfig(),
    ),
    Task(
        name="english-wide",
        use="held-out",
        corpus="english",
        model=LlamaConfig(width=96, hidden_width=256, num_layers=2, num_heads=6, num_kv_heads=2),
    ),
    Task(
        name="english-deep",
        use="held-out",
        corpus="english",
        model=LlamaConfig(width=48, hidden_width=128, num_layers=6, num_heads=3, num_kv_heads=3),
    ),
    Task(
        name="english-gpt2",
        use="held-out",
        corpus="english",
        model=Gpt2Config(width=64, num_layers=3, num_heads=4),
    ),
    Task(
        name="smoke",
        use="tuning",
        corpus="python-source",
        model=LlamaConfig(width=16, hidden_width=32, num_layers=1, num_heads=2, num_kv_heads=1),
        batch_size=4,
        sequence_length=16,
        num_validation_sequences=16,
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in TASKS:
        raise ConfigError(f"task is {name!r}; allowed: {', '.join(TASKS)}")
    return TASKS[name]
