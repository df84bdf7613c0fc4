"""The "nowcaster" section: defaults, conversions, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sidecast.errors import ConfigError
from sidecast.trainer.hook.config import NowcasterConfig, parse_section
from sidecast.trainer.hook.policies.verdicts import MIN_POINTS, is_judgeable
from sidecast.trainer.hook.schedule import Schedule


def test_defaults() -> None:
    config = parse_section({})
    assert config == NowcasterConfig()
    assert (config.interval_steps, config.resolved_vote_interval_steps) == (200, 10)
    assert (config.resolved_max_staleness_steps, config.resolved_probation_steps) == (199, 500)


def test_values_find_their_fields() -> None:
    config = parse_section(
        {
            "horizon": {"schedule": "power", "max": 40},
            "max_steps": 5000,
            "max_weight": 1,
            "probation_steps": 0,
            "vote_interval_steps": None,
            "timeouts": {"connect_s": 1},
            "predictor_options": {"layout": "official"},
            "read_outs": ["ema5", "mean@100"],
        }
    )
    assert config.read_outs == ("ema5", "mean@100")
    assert (config.horizon.max, config.timeouts.connect_s, config.resolved_probation_steps) == (40, 1.0, 0)
    assert isinstance(config.max_weight, float)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"endpiont": "x"}, "nowcaster has an unknown key 'endpiont'; allowed: "),
        ({"horizon": {"maxi": 3}}, "nowcaster.horizon has an unknown key 'maxi'; allowed: max, power, schedule"),
        ({"horizon": 3}, "nowcaster.horizon is 3; allowed: an object"),
        ([], r"nowcaster is \[\]; allowed: an object"),
        ({"context_len": "5"}, "nowcaster.context_len is '5'; allowed: a whole number"),
        ({"context_len": True}, "nowcaster.context_len is True; allowed: a whole number"),
        ({"context_len": 5.0}, "nowcaster.context_len is 5.0; allowed: a whole number"),
        ({"enabled": 1}, "nowcaster.enabled is 1; allowed: true or false"),
        ({"enabled": None}, "nowcaster.enabled is None; allowed: true or false"),
        ({"max_weight": "1"}, "nowcaster.max_weight is '1'; allowed: a number"),
        ({"predictor": 3}, "nowcaster.predictor is 3; allowed: a text"),
        ({"predictor_options": []}, r"nowcaster.predictor_options is \[\]; allowed: an object"),
        ({"keep_best": 1}, "nowcaster.keep_best is 1; allowed: 0 to 8, and 0 without read_outs$"),
        ({"keep_best": 9, "read_outs": ["ema5"]}, "nowcaster.keep_best is 9; allowed: 0 to 8"),
        ({"read_outs": "ema5"}, r"nowcaster.read_outs is 'ema5'; allowed: a list of texts$"),
        ({"read_outs": [5]}, r"nowcaster.read_outs is \[5\]; allowed: a list of texts$"),
        ({"read_outs": ["ema5", "emu"]}, "nowcaster.read_outs: a read-out is 'emu'; allowed: 'emaP'"),
        ({"replay_dir": ".", "read_outs": ["ema5"]}, "nowcaster.read_outs is .*; allowed: none, since replay"),
        ({"mode": "now"}, "nowcaster.mode is 'now'; allowed: 'async', 'sync'"),
        ({"max_steps": "9"}, "nowcaster.max_steps is '9'; allowed: a whole number, or null"),
        ({"horizon": {"schedule": "x"}}, "nowcaster.horizon.schedule is 'x'; allowed: 'constant', 'power', or null"),
        ({"channels": None}, "nowcaster.channels is None; allowed: a whole number$"),
        ({"max_weight": True}, "nowcaster.max_weight is True; allowed: a number"),
        ({"horizon": None}, "nowcaster.horizon is None; allowed: an object"),
        ({"rollback": []}, r"nowcaster.rollback is \[\]; allowed: "),
        ({"context_len": 1}, "nowcaster.context_len is 1; allowed: 2 or more"),
        ({"period_steps": 3}, "nowcaster.period_steps is 3; allowed: context_len or more"),
        ({"period_steps": 1001}, r"nowcaster.period_steps is 1001; allowed: a multiple of context_len \(5\)"),
        ({"max_steps": 0}, "nowcaster.max_steps is 0"),
        ({"horizon": {"max": 0}}, "nowcaster.horizon.max is 0"),
        ({"horizon": {"power": 0}}, "nowcaster.horizon.power is 0.0"),
        ({"horizon": {"power": 1000}}, "nowcaster.horizon.power is 1000.0"),
        ({"horizon": {"schedule": "power"}}, "nowcaster.max_steps is None"),
        ({"vote_interval_steps": 201}, "nowcaster.vote_interval_steps is 201; allowed: 1 to 200"),
        ({"vote_lag_steps": 11}, "nowcaster.vote_lag_steps is 11; allowed: 0 to 10"),
        ({"period_steps": 5}, "nowcaster.vote_interval_steps is 1; .*vote_lag_steps \\(2\\) is at most .* \\(0\\)"),
        ({"period_steps": 10}, "nowcaster.vote_interval_steps is 1; .* no prediction could ever be applied"),
        ({"max_staleness_steps": 10}, "nowcaster.vote_interval_steps is 10; .*vote_lag_steps \\(11\\)"),
        ({"merge": "mix"}, "nowcaster.merge is 'mix'; allowed: 'age_weighted', 'replace', 'add'"),
        ({"moments": "drop"}, "nowcaster.moments is 'drop'; allowed: 'keep', 'reset', 'scale'"),
        ({"during_decay": "stop"}, "nowcaster.during_decay is 'stop'; allowed: 'scale', 'suspend', 'allow'"),
        ({"rollback": "disk"}, "nowcaster.rollback_dir is None; allowed: a folder if rollback is 'disk', else null"),
        ({"rollback_dir": "x"}, "nowcaster.rollback_dir is 'x'; allowed: a folder if rollback is 'disk', else null"),
        ({"max_host_memory_gib": 0}, "nowcaster.max_host_memory_gib is 0.0; allowed: a positive number, or null"),
        ({"max_staleness_steps": 200}, "nowcaster.max_staleness_steps is 200; allowed: 0 to 199"),
        ({"probation_steps": 1000}, "nowcaster.probation_steps is 1000; allowed: 0 to 999"),
        ({"probation_steps": 60}, "probation_steps is 60; allowed: 0 .* vote_interval_steps 10 .* is 61"),
        (
            {"mode": "sync", "period_steps": 40, "vote_interval_steps": 8, "probation_steps": 20},
            "nowcaster.probation_steps is 20; allowed: 0 .* is not below period_steps",
        ),
        ({"max_weight": 0}, "nowcaster.max_weight is 0.0"),
        ({"max_weight": float("nan")}, "nowcaster.max_weight is nan"),
        ({"max_relative_norm": 0}, "nowcaster.max_relative_norm is 0.0"),
        ({"acceptance_sigmas": -1}, "nowcaster.acceptance_sigmas is -1.0"),
        ({"max_rollbacks": 0}, "nowcaster.max_rollbacks is 0"),
        ({"sync_deadline_s": 0}, "nowcaster.sync_deadline_s is 0.0"),
        ({"endpoint": "localhost"}, "nowcaster.endpoint is 'localhost'; allowed: HOST:PORT"),
        ({"endpoint": ":50051"}, "nowcaster.endpoint is ':50051'; allowed: HOST:PORT"),
        ({"endpoint": "h:70000"}, "nowcaster.endpoint is 'h:70000'; allowed: HOST:PORT"),
        ({"metrics_port": 70000}, "nowcaster.metrics_port is 70000; allowed: 0 to 65535, or null"),
        ({"token_file": "/nowhere"}, "nowcaster.token_file is '/nowhere'; allowed: an existing file"),
        ({"tls_ca": "/nowhere"}, "nowcaster.tls_ca is '/nowhere'; allowed: an existing file"),
        ({"timeouts": {"chunk_s": 5}}, "nowcaster.timeouts is .*0 < connect_s < chunk_s < stream_s"),
        ({"replay_dir": "/nowhere"}, "nowcaster.replay_dir is '/nowhere'; allowed: an existing folder"),
    ],
)
def test_refusals_name_key_value_and_what_is_allowed(section: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_section(section)


@pytest.mark.parametrize("vote_interval_steps", [1, 3, 8])
@pytest.mark.parametrize("vote_lag_steps", [0, 1])
@pytest.mark.parametrize("probation_steps", [7, 8, 9, 25, 26, 27, 33, 60, 64, 65, 72, 73])
def test_a_verdict_has_its_losses_after_whatever_vote_a_jump_comes(
    vote_interval_steps: int, vote_lag_steps: int, probation_steps: int
) -> None:
    vote_steps = range(0, 400, vote_interval_steps)
    jump_step = vote_steps[100 // vote_interval_steps] + vote_lag_steps
    end_step = next(step for step in vote_steps if step + vote_lag_steps >= jump_step + probation_steps)
    num_before = sum(jump_step - probation_steps <= step <= jump_step for step in vote_steps)
    num_after = sum(jump_step + probation_steps // 2 < step <= end_step for step in vote_steps)
    found = is_judgeable(probation_steps, vote_interval_steps, vote_lag_steps, at_any_step=False)
    assert found == (min(num_before, num_after) >= MIN_POINTS)
    if is_judgeable(probation_steps, vote_interval_steps, vote_lag_steps, at_any_step=True):
        assert found


def test_half_a_period_that_is_too_short_for_a_verdict_becomes_as_long_as_one_takes() -> None:
    config = parse_section({"period_steps": 10, "vote_lag_steps": 0})
    assert config.resolved_probation_steps == 7
    assert parse_section({"period_steps": 20}).resolved_probation_steps == 10


def test_a_run_is_recorded_or_replayed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="since replay_dir is set"):
        parse_section({"replay_dir": str(tmp_path), "record_dir": str(tmp_path)})
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"nowcaster.record_dir is .*; allowed: a folder"):
        parse_section({"record_dir": str(tmp_path / "file")})


def test_steps() -> None:
    schedule = Schedule.of(parse_section({"period_steps": 40, "context_len": 4, "vote_interval_steps": 5}))
    assert [step for step in range(41) if schedule.is_snapshot(step)] == [10, 20, 30, 40]
    assert [step for step in range(81) if schedule.is_base(step)] == [40, 80]
    assert [step for step in range(16) if schedule.is_vote(step)] == [5, 10, 15]


@pytest.mark.parametrize(
    "section",
    [
        {"period_steps": 15},
        {"period_steps": 10, "vote_lag_steps": 0},
        {"period_steps": 5, "mode": "sync", "probation_steps": 0},
        {"period_steps": 5, "mode": "sync", "rollback": "off"},
        {"max_staleness_steps": 11},
        {"max_staleness_steps": 0, "mode": "sync"},
    ],
)
def test_whatever_can_be_applied_is_allowed(section: dict[str, Any]) -> None:
    parse_section(section)
