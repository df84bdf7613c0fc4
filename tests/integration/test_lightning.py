"""The Lightning callback: harmless while nothing is applied, and resumed bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from service_harness import RunningService
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sidecast.nowcaster_service.nowcasting import NowcastAnswer

lightning = pytest.importorskip("lightning")

from sidecast import LightningNowcastCallback  # noqa: E402

PERIOD_STEPS = 20
# In the middle of the probation of the jump of step 20, and of the next window.
SAVE_STEP = 26
NUM_STEPS = 45


class Regression(lightning.LightningModule):  # type: ignore[misc,name-defined]
    """Notes its losses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 1))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        # Lightning goes on counting batches after a resume, but begins the data anew.
        inputs = torch.randn(2, 4, generator=torch.Generator().manual_seed(batch_idx))
        loss = (self.net(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Listener(lightning.Callback):  # type: ignore[misc,name-defined]
    """Listens once the hook is there."""

    def __init__(self, nowcasts: LightningNowcastCallback) -> None:
        self.nowcasts = nowcasts
        self.events: list[tuple[str, int]] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.nowcasts.nowcaster.add_listener(lambda event: self.events.append((event.kind, event.step)))


def train(
    settings: Mapping[str, Any] | None,
    *,
    num_steps: int = NUM_STEPS,
    save: Path | None = None,
    load: Path | None = None,
    strategy: str = "auto",
) -> tuple[list[float], list[tuple[str, int]], Tensor]:
    """Trains; returns the losses, the hook's events and the weights."""
    data = torch.zeros(4 * NUM_STEPS, 1)
    nowcasts = LightningNowcastCallback(settings)
    listener = Listener(nowcasts)
    trainer = lightning.Trainer(
        max_steps=num_steps,
        accelerator="cpu",
        strategy=strategy,
        devices="auto" if strategy == "auto" else 2,
        accumulate_grad_batches=2,
        callbacks=[] if settings is None else [nowcasts, listener],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Regression()
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=2), ckpt_path=None if load is None else str(load))
    if save is not None:
        trainer.save_checkpoint(save)
    weights = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
    return module.losses, listener.events, weights


def section(endpoint: str) -> dict[str, Any]:
    plain = {"endpoint": endpoint, "require": True, "period_steps": PERIOD_STEPS, "mode": "sync"}
    return plain | {"max_relative_norm": 1e3}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with RunningService(tmp_path_factory.mktemp("service")) as running:
        yield running


def test_nothing_applied_changes_nothing(service: RunningService) -> None:
    service.engines.answer = NowcastAnswer(refusal="not today")
    try:
        losses, events, weights = train(section(service.endpoint))
    finally:
        service.engines.answer = None
    assert [step for kind, step in events if kind == "failed"] == [PERIOD_STEPS, 2 * PERIOD_STEPS]
    plain_losses, _, plain_weights = train(None)
    assert losses == plain_losses
    assert torch.equal(weights, plain_weights)


def test_a_resumed_run_equals_the_uninterrupted_one(service: RunningService, tmp_path: Path) -> None:
    settings = section(service.endpoint)
    losses, events, weights = train(settings)
    assert [step for kind, step in events if kind == "applied"] == [PERIOD_STEPS, 2 * PERIOD_STEPS]
    checkpoint = tmp_path / "middle.ckpt"
    train(settings, num_steps=SAVE_STEP, save=checkpoint)
    later_losses, later_events, later_weights = train(settings, load=checkpoint)
    verdicts = [
        event for event in events if event[0] in ("accepted", "rolled_back", "applied") and event[1] > SAVE_STEP
    ]
    assert [event for event in later_events if event[0] in ("accepted", "rolled_back", "applied")] == verdicts
    assert later_losses == losses[2 * SAVE_STEP :]
    assert torch.equal(later_weights, weights)
