"""Runs of a small model under Lightning, with the callback and without."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from sidecast import LightningNowcastCallback

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
        self.nowcasts.hook.add_listener(lambda event: self.events.append((event.kind, event.step)))


def train(
    settings: Mapping[str, Any] | None,
    *,
    num_steps: int = NUM_STEPS,
    save: Path | None = None,
    load: Path | None = None,
    strategy: Any = "auto",
    module: Regression | None = None,
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
    module = Regression() if module is None else module
    trainer.fit(module, DataLoader(TensorDataset(data), batch_size=2), ckpt_path=None if load is None else str(load))
    if save is not None:
        trainer.save_checkpoint(save)
    whole = [item.full_tensor() if isinstance(item, DTensor) else item for item in module.parameters()]
    weights = torch.cat([parameter.detach().flatten() for parameter in whole])
    return module.losses, listener.events, weights


class Overflowing(Regression):
    """Trained in fp16 with a scale that overflows at first, and grows soon after; notes what moved it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_moved = 0
        self._before = self.net[0].weight.detach().clone()

    def on_train_batch_end(self, *_: Any) -> None:
        now = self.net[0].weight.detach().clone()
        self.num_moved += not torch.equal(now, self._before)
        self._before = now


class Collecting(DummyLogger):  # type: ignore[misc]
    """Keeps what it is given of nowcasting."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        if "sidecast/num_applied" in metrics:
            self.rows.append(metrics | {"step": step})


class Manual(Regression):
    """Makes three optimizer steps for each batch by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        for part in range(3):
            optimizer.zero_grad()
            self.go_back(super().training_step(batch, 3 * batch_idx + part))
            optimizer.step()

    def go_back(self, loss: Tensor) -> None:
        self.manual_backward(loss)


class Hiding(Manual):
    """Begins its backward passes by itself, too."""

    def go_back(self, loss: Tensor) -> None:
        loss.backward()


def train_by_hand(module: Regression, settings: Mapping[str, Any], **options: Any) -> tuple[Any, list[float]]:
    """Trains without accumulation; returns the hook and the losses that it was given."""
    nowcasts = LightningNowcastCallback(settings)
    seen: list[float] = []

    class Watch(lightning.Callback):  # type: ignore[misc,name-defined]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            attachment: Any = nowcasts._attachment
            observe = attachment.observe
            attachment.observe = lambda loss: [seen.append(float(loss)), observe(loss)]

    trainer = lightning.Trainer(
        max_steps=NUM_STEPS,
        accelerator="cpu",
        callbacks=[nowcasts, Watch()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False} | options,
    )
    trainer.fit(module, DataLoader(TensorDataset(torch.zeros(4 * NUM_STEPS, 1)), batch_size=2))
    return nowcasts.hook, seen


def section(endpoint: str) -> dict[str, Any]:
    plain = {"endpoint": endpoint, "require": True, "period_steps": PERIOD_STEPS, "mode": "sync"}
    return plain | {"max_relative_norm": 1e3}
