"""Nowcasting around a torch optimizer, in one process and without a service; compares predictors on one small task.

python examples/nowcast_optimizer.py
python examples/nowcast_optimizer.py --predictors linear rank1 average --period-steps 200
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from sidecast import NowcastOptimizer


def train(predictor: str | None, num_steps: int, period_steps: int) -> tuple[float, str]:
    """Trains one model; returns its last loss and what became of its nowcasts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if predictor is not None:
        optimizer = NowcastOptimizer(optimizer, model, predictor, period_steps=period_steps, max_steps=num_steps)

    loss = torch.tensor(0.0)
    for _ in range(num_steps):
        inputs = torch.randn(64, 16)
        loss = (model(inputs) - inputs.square().mean(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if isinstance(optimizer, NowcastOptimizer):
            optimizer.observe(loss)  # a jump after which it does not come back to its trend is undone
        optimizer.step()

    if not isinstance(optimizer, NowcastOptimizer):
        return loss.item(), "no nowcasts"
    summary = optimizer.hook.summary()
    optimizer.hook.close()
    return loss.item(), f"{summary['num_applied']} nowcasts applied, {summary['num_rolled_back']} of them undone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictors", nargs="+", default=["linear", "rank1"])
    parser.add_argument("--period-steps", type=int, default=100, help="steps between nowcasts")
    parser.add_argument("--max-steps", type=int, default=1000)
    args = parser.parse_args()
    for predictor in [None, *args.predictors]:
        loss, outcome = train(predictor, args.max_steps, args.period_steps)
        print(f"{predictor or 'plain':>16}: loss {loss:.4f}, {outcome}")


if __name__ == "__main__":
    main()
