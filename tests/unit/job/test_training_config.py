from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sidecast.errors import ConfigError
from sidecast.trainer import main
from sidecast.trainer.hook.config import parse_section
from sidecast.trainer.job.config import load_config


@pytest.mark.parametrize("name", ["default", "demo", "demo-jumps"])
def test_shipped_configurations_are_valid(name: str) -> None:
    config = load_config(name)
    parse_section(config.deepspeed["nowcaster"])
    assert config.training.steps > 0
    assert "training" not in config.deepspeed


def test_later_overrides_win_and_reach_nested_keys() -> None:
    config = load_config("default", [("zero_optimization.stage", 1), ("training.steps", 300), ("training.steps", 400)])
    assert config.deepspeed["zero_optimization"]["stage"] == 1
    assert config.training.steps == 400


def test_nowcaster_learns_the_length_of_the_run_unless_it_is_given() -> None:
    assert load_config("default", [("training.steps", 300)]).deepspeed["nowcaster"]["max_steps"] == 300
    given = load_config("default", [("nowcaster.max_steps", 7)])
    assert given.deepspeed["nowcaster"]["max_steps"] == 7


def test_pushes_are_not_told_the_length_of_the_run_since_they_have_no_horizon() -> None:
    config = load_config("default", [("nowcaster", {"policy": "push"})])
    assert config.deepspeed["nowcaster"] == {"policy": "push"}


def test_zero_is_a_value() -> None:
    config = load_config("default", [("training.seed", 0), ("training.schedule.warmup_steps", 0)])
    assert config.training.schedule.warmup_steps == 0


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("training.stpes", 3, ["training has an unknown key 'stpes'; allowed: ", "seed, steps, "]),
        ("training.steps", True, ["training.steps is True; allowed: a whole number"]),
        ("training.steps", 0, ["training.steps is 0; allowed: 1 or more"]),
        ("training.checkpoint_interval_steps", "often", ["is 'often'; allowed: a whole number, or null"]),
        ("training.schedule.kind", "linear", ["kind is 'linear'; allowed: 'constant', 'cosine', 'wsd'"]),
        ("training.schedule.warmup_steps", 1001, ["1001", "at most", "1000"]),
        ("training.schedule.decay_steps", 10, ["training.schedule.decay_steps is 10; allowed: null", "'wsd'"]),
        ("training.model.num_key_value_heads", 3, ["num_key_value_heads is 3; allowed: ", "num_attention_heads, 4"]),
        ("training.model.hidden_size", 90, ["hidden_size is 90; allowed: ", "num_attention_heads, 4"]),
        ("training.data.validation_fraction", 1.0, ["validation_fraction is 1.0; allowed: "]),
        ("training.model.from_scratch", True, ["from_scratch is True; allowed: false", "training.model.source"]),
        ("training.schedule.min_ratio", "0", ["training.schedule.min_ratio is '0'; allowed: a number"]),
        ("training.data", 5, ["training.data is 5; allowed: an object"]),
        ("training.steps.x", 5, ["training.steps.x", "not a section"]),
        ("nowcater.period_steps", 5, ["nowcater", "nowcaster"]),
        ("nowcaster", 5, ["nowcaster is 5; allowed: an object"]),
        ("optimizer", None, ["optimizer", "null", "type and params"]),
        ("scheduler", {}, ["scheduler", "training.schedule"]),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(key: str, value: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config("default", [(key, value)])
    message = str(refusal.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_unreadable_and_malformed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json.*default, demo"):
        load_config("nowhere.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(str(tmp_path / "broken.json"))
    (tmp_path / "list.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="JSON object"):
        load_config(str(tmp_path / "list.json"))


def test_what_deepspeed_refuses_without_a_word_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: dict[str, Any]) -> None:
        raise AssertionError

    monkeypatch.setattr(main, "DeepSpeedConfig", refuse)
    with pytest.raises(ConfigError, match="DeepSpeed refuses the configuration: AssertionError"):
        main._check_deepspeed_config({})
