"""Nowcasting in Lightning. Beside a running `sidecast serve`:

python examples/lightning_module.py
python examples/lightning_module.py --strategy deepspeed_stage_2    (on GPUs)
"""

from __future__ import annotations

import argparse

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sidecast import LightningNowcastCallback


class Regression(lightning.LightningModule):
    """Learns the mean square of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (inputs,) = batch
        return (self.net(inputs) - inputs.square().mean(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", default="127.0.0.1:50051", help="of the nowcaster service")
    parser.add_argument("--predictor", default="linear")
    # So small a model outruns its nowcasts. A real one need not wait for them: async is the setting's own default.
    parser.add_argument("--mode", choices=["async", "sync"], default="sync", help="async: never wait for a nowcast")
    parser.add_argument("--period-steps", type=int, default=50, help="steps between nowcasts")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--strategy", default="auto")
    args = parser.parse_args()

    lightning.seed_everything(0)
    nowcasts = LightningNowcastCallback(
        {
            "endpoint": args.endpoint,
            "predictor": args.predictor,
            "mode": args.mode,
            "period_steps": args.period_steps,
        }
    )
    trainer = lightning.Trainer(
        max_steps=args.max_steps,
        strategy=args.strategy,
        callbacks=[nowcasts],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = DataLoader(TensorDataset(torch.randn(1024, 16)), batch_size=32, shuffle=True)
    trainer.fit(Regression(), data)
    summary = nowcasts.hook.summary()
    print(f"{summary['num_applied']} nowcasts applied, {summary['num_rolled_back']} of them undone")


if __name__ == "__main__":
    main()
