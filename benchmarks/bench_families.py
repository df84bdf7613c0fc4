"""Of how many causal language models of transformers the symmetric graph builds, and is right on the network.

Each family at tiny widths with random weights, as ``sidecast graph --check`` runs it; image classifiers of torchvision
and timm as for ``--module``, at tiny widths where they have some. A graph that holds most of what has an effect on the
output is of no use and does not count.

    python -m benchmarks.bench_families --preset ci | full
    python -m benchmarks.bench_families --types gemma2 mamba --adapters
    python -m benchmarks.bench_families --library torchvision | timm
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.vision_models import vision_families, vision_model
from sidecast.commands.graph_check import check_config, tiny_model
from sidecast.commands.tiny_adapters import linear_layers
from sidecast.errors import SidecastError
from sidecast.graphs import Topology, build_topology
from sidecast.graphs.automorphism_check import AutomorphismCheck
from sidecast.graphs.module_trace import checked_manifest_of_module

MOST_USED = (
    "llama", "qwen2", "qwen3", "mistral", "gpt2", "mixtral", "gemma", "gemma2", "gemma3_text", "phi", "phi3",
    "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss", "opt", "gpt_neox", "gpt_neo", "gptj", "bloom",
    "falcon", "stablelm", "olmo2", "granite", "smollm3", "starcoder2", "mamba2", "cohere", "llama4_text",
)  # fmt: skip
PRESETS = {
    "ci": ("llama", "gpt2", "gemma2", "gpt_neox", "bloom", "mamba"),
    "full": tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
}
# What a family's default configuration leaves out although its model needs it.
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16, "num_hidden_layers": 32},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "nemotron": {"num_key_value_heads": 48},
}
MAX_SECONDS = 120
LEAST_MOVED = 0.5


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one family.

    Attributes:
        model_type: Its name in transformers.
        graph: Which builder drew it; empty if it was refused.
        moved: The share that the check moved of the elements of parameters with an effect on the output.
        seconds: For the model, the graph and the check.
        refusal: Why it does not count; empty if it does.
    """

    model_type: str
    graph: str = ""
    moved: float = 0.0
    seconds: float = 0.0
    refusal: str = ""


def outcome_of(model_type: str, library: str = "transformers", *, has_adapters: bool = False) -> Outcome:
    """Builds and checks one family; whatever it raises is its refusal.

    Args:
        model_type: Its name in its library.
        library: ``transformers``, ``torchvision`` or ``timm``.
        has_adapters: Of transformers: with low-rank adapters beside all linear layers.
    """
    start = time.perf_counter()
    try:
        with _time_limit(MAX_SECONDS):
            topology, check = _checked(model_type, library, has_adapters=has_adapters)
    except (Exception, _OutOfTimeError) as error:
        name = "" if isinstance(error, SidecastError | _OutOfTimeError) else f"{type(error).__name__}: "
        seconds = time.perf_counter() - start
        return Outcome(model_type=model_type, seconds=seconds, refusal=name + " ".join(str(error).split()))
    sizes = {spec.fqn: spec.numel for spec in topology.parameters}
    num_with_effect = check.num_elements - sum(sizes[name] for name in check.without_effect)
    moved = check.num_moved_elements / num_with_effect if num_with_effect else 0.0
    return Outcome(
        model_type=model_type,
        graph=topology.family,
        moved=moved,
        seconds=time.perf_counter() - start,
        refusal="" if moved >= LEAST_MOVED else f"its graph moves only {moved:.0%}",
    )


def _checked(name: str, library: str, *, has_adapters: bool) -> tuple[Topology, AutomorphismCheck]:
    if library != "transformers":
        manifest, check = checked_manifest_of_module(*vision_model(library, name))
        return build_topology(manifest, "symmetric"), check
    config = _default_config(name)
    return check_config(config, linear_layers(tiny_model(config)[0]) if has_adapters else ())


def _default_config(model_type: str) -> dict[str, Any]:
    config: dict[str, Any] = CONFIG_MAPPING[model_type]().to_dict()
    return {**config, **_LEFT_OUT.get(model_type, {}), "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]}


class _OutOfTimeError(BaseException):
    """No ``Exception``, so that nothing that guards against models' errors takes it for one of theirs."""


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: object) -> None:
        raise _OutOfTimeError(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def report(model_types: Sequence[str], library: str = "transformers", *, has_adapters: bool = False) -> list[Outcome]:
    """Writes a line for each family, and the shares that are right; arguments are those of ``outcome_of``."""
    write = sys.stdout.write
    write(f"transformers {transformers.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    outcomes = []
    for model_type in model_types:
        outcome = outcome_of(model_type, library, has_adapters=has_adapters)
        outcomes.append(outcome)
        result = f"refused: {outcome.refusal}" if outcome.refusal else f"{outcome.graph}, moves {outcome.moved:.0%}"
        write(f"{model_type:28} {outcome.seconds:6.2f} s  {result}\n")
        sys.stdout.flush()
    _write_share("all of these", outcomes)
    most_used = [outcome for outcome in outcomes if outcome.model_type in MOST_USED]
    if most_used and library == "transformers":
        _write_share(f"of the {len(MOST_USED)} most used", most_used)
    return outcomes


def _write_share(name: str, outcomes: Sequence[Outcome]) -> None:
    num_right = sum(not outcome.refusal for outcome in outcomes)
    sys.stdout.write(f"{name}: {num_right} of {len(outcomes)} right ({num_right / len(outcomes):.0%})\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="ci")
    parser.add_argument("--types", nargs="+", metavar="TYPE", help="these families, in place of a preset's")
    parser.add_argument("--library", choices=("transformers", "torchvision", "timm"), default="transformers")
    parser.add_argument("--adapters", action="store_true", help="with adapters beside all linear layers")
    arguments = parser.parse_args()
    is_vision = arguments.library != "transformers"
    names = vision_families(arguments.library) if is_vision else PRESETS[arguments.preset]
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    report(arguments.types or names, arguments.library, has_adapters=arguments.adapters)


if __name__ == "__main__":
    main()
