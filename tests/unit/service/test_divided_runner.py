"""What a pool's caller hears of a worker's refusal."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import ray

from sidecast.errors import ConfigError
from sidecast.nowcaster_service.engine_pool import DividedRunner
from sidecast.predictors.passes import PassPredictor


def test_a_workers_refusal_is_told_in_one_line() -> None:
    def refuse(*_: Any) -> None:
        raise ray.exceptions.RayTaskError("run", "Traceback: many\nlines", ConfigError("bad")).as_instanceof_cause()

    predictor = Mock(spec=PassPredictor)
    runner = DividedRunner(2, 1)
    runner._pool, runner._loaded = SimpleNamespace(predict=refuse), predictor  # type: ignore[assignment]
    with pytest.raises(ConfigError) as caught:
        runner.predict(predictor, None, 1, Path("delta"))  # type: ignore[arg-type]
    assert str(caught.value) == "bad"
