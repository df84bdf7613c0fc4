"""Nowcasting around a torch optimizer, in one process and without a service; compares jumps of several predictors, and
pushes, on one small task.

python examples/nowcast_optimizer.py
python examples/nowcast_optimizer.py --predictors linear rank1 average --period-steps 200
python examples/nowcast_optimizer.py --predictors --push-interval-steps 20
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

from sidecast import NowcastOptimizer


def train(num_steps: int, nowcasts: dict[str, Any] | None) -> tuple[float, str]:
    """Trains one model; returns its last loss and what became of its nowcasts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if nowcasts is not None:
        optimizer = NowcastOptimizer(optimizer, model, **nowcasts)

    loss = torch.tensor(0.0)
    for _ in range(num_steps):
        inputs = torch.randn(64, 16)
        loss = (model(inputs) - inputs.square().mean(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if isinstance(optimizer, NowcastOptimizer):
            # A jump after which it does not come back to its trend is undone; a rise ends pushes.
            optimizer.observe(loss)
        optimizer.step()

    if not isinstance(optimizer, NowcastOptimizer):
        return loss.item(), "no nowcasts"
    summary = optimizer.hook.summary()
    optimizer.hook.close()
    if summary["policy"] == "push":
        return loss.item(), f"{summary['num_applied']} pushes applied{', and ended' if summary['suspended'] else ''}"
    return loss.item(), f"{summary['num_applied']} nowcasts applied, {summary['num_rolled_back']} of them undone"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predictors", nargs="*", default=["linear", "rank1"], help="of jumps")
    parser.add_argument("--period-steps", type=int, default=100, help="steps between jumps")
    parser.add_argument("--push-interval-steps", type=int, default=20, help="steps between pushes")
    parser.add_argument("--max-steps", type=int, default=1000)
    args = parser.parse_args()
    arms: dict[str, dict[str, Any] | None] = {"plain": None}
    for predictor in args.predictors:
        arms[predictor] = {"predictor": predictor, "period_steps": args.period_steps, "max_steps": args.max_steps}
    arms["push"] = {"policy": "push", "push": {"interval_steps": args.push_interval_steps}}
    for name, nowcasts in arms.items():
        loss, outcome = train(args.max_steps, nowcasts)
        print(f"{name:>16}: loss {loss:.4f}, {outcome}")


if __name__ == "__main__":
    main()
