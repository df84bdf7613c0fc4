"""Facts about a DeepSpeed engine that are not its weights."""

from __future__ import annotations

from typing import Any


def nowcaster_section(engine: Any) -> Any:
    """The ds_config's top-level ``"nowcaster"`` section, from whatever form the configuration was given in."""
    # engine.config is what the user passed (a dict, a path, base64 or None); only this holds it parsed.
    return engine._config._param_dict.get("nowcaster")


def applied_steps(engine: Any) -> int:
    """Optimizer steps that changed the weights: fp16 overflows are not among them."""
    return int(engine.global_steps) - int(engine.skipped_steps)


def zero_stage(engine: Any) -> int:
    """The ZeRO stage, 0 to 3."""
    return int(engine.zero_optimization_stage())
