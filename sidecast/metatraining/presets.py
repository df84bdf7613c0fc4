"""Recipes by name: ``default`` makes what is shipped, ``ci`` takes seconds and is worth nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sidecast.evaluation.models.gpt2 import Gpt2Config
from sidecast.evaluation.models.llama import LlamaConfig
from sidecast.evaluation.tasks import TASKS, Task
from sidecast.metatraining.recipe import Recipe
from sidecast.metatraining.sources import Source


def _task(name: str, model: LlamaConfig | Gpt2Config, batch_size: int) -> Task:
    return Task(
        name=name,
        use="tuning",
        corpus="python-source",
        model=model,
        batch_size=batch_size,
        num_validation_sequences=64,
    )


_LLAMA_64 = _task("llama-3x64", LlamaConfig(), 8)
_LLAMA_64_LARGE_BATCH = _task("llama-3x64-large-batch", LlamaConfig(), 32)
_LLAMA_48 = _task("llama-2x48", LlamaConfig(width=48, hidden_width=128, num_layers=2, num_heads=3, num_kv_heads=3), 16)
_LLAMA_32 = _task("llama-4x32", LlamaConfig(width=32, hidden_width=96, num_layers=4, num_heads=2, num_kv_heads=1), 16)
_GPT2_32 = _task("gpt2-2x32", Gpt2Config(width=32, num_layers=2, num_heads=2), 16)


def _sources(task: Task, use: Literal["training", "validation"], seed: int, *lrs: float) -> list[Source]:
    return [
        Source(task=task, use=use, seed=seed + offset, lrs=lrs, schedule=schedule, num_steps=800, snapshot_steps=10)
        for offset, schedule in enumerate(("constant", "cosine"))
    ]


_DEFAULT_SOURCES = (
    *_sources(_LLAMA_32, "training", 1_000, 4e-3, 1e-2),
    *_sources(_LLAMA_48, "training", 2_000, 3e-3, 8e-3),
    *_sources(_LLAMA_64, "training", 3_000, 4e-3, 8e-3),
    *_sources(_LLAMA_64, "validation", 4_000, 6e-3),
    *_sources(_GPT2_32, "training", 5_000, 3e-3, 6e-3),
    *_sources(_LLAMA_64_LARGE_BATCH, "training", 6_000, 8e-3)[:1],
    *_sources(_GPT2_32, "validation", 7_000, 4e-3)[:1],
)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What to train nowcasters on, and how.

    Attributes:
        sources: Of the trajectories, in the order in which they are trained.
        recipes: By nowcaster.
    """

    sources: tuple[Source, ...]
    recipes: Mapping[str, Recipe]

    def recipe(self, nowcaster: str, *, layout: str | None, seed: int) -> Recipe:
        """The recipe of a nowcaster.

        Args:
            nowcaster: One of ``NOWCASTERS``.
            layout: Instead of the recipe's own; None for that.
            seed: Of the initial network and of what is drawn.
        """
        recipe = self.recipes[nowcaster]
        return replace(recipe, layout=layout or recipe.layout, seed=seed)


_SMOKE = TASKS["smoke"]
_CI_RECIPE = Recipe(
    nowcaster="wnn",
    hidden_dim=16,
    max_horizon=4,
    num_steps=6,
    warmup_steps=2,
    num_sources=4,
    num_fit_windows=4,
    windows_per_step=1,
    spacings=(1,),
    first_snapshot=1,
    validation_steps=3,
    validation_spacings=(1,),
    validation_newest=(6,),
    validation_horizons=(1, 4),
)

PRESETS: Mapping[str, Preset] = {
    "ci": Preset(
        sources=(
            Source(
                task=_SMOKE,
                use="training",
                seed=0,
                lrs=(4e-3,),
                schedule="constant",
                num_steps=40,
                snapshot_steps=2,
                warmup_steps=2,
            ),
            Source(
                task=_SMOKE,
                use="validation",
                seed=1,
                lrs=(4e-3,),
                schedule="constant",
                num_steps=40,
                snapshot_steps=2,
                warmup_steps=2,
            ),
        ),
        recipes={name: replace(_CI_RECIPE, nowcaster=name) for name in ("nino", "wnn_plus", "wnn")},
    ),
    "default": Preset(
        sources=_DEFAULT_SOURCES,
        recipes={
            "nino": Recipe(nowcaster="nino", num_steps=400, validation_steps=50),
            "wnn_plus": Recipe(nowcaster="wnn_plus", num_steps=400, validation_steps=50),
            "wnn": Recipe(nowcaster="wnn", num_steps=400, validation_steps=50),
        },
    ),
}
