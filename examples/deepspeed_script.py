"""Nowcasting in a DeepSpeed script. Beside a running `sidecast serve`:

deepspeed --num_gpus 2 examples/deepspeed_script.py
"""

from __future__ import annotations

import argparse

import deepspeed
import torch
from torch import nn

import sidecast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", default="127.0.0.1:50051", help="of the nowcaster service")
    parser.add_argument("--predictor", default="linear")
    # So small a model outruns its nowcasts. A real one need not wait for them: async is the setting's own default.
    parser.add_argument("--mode", choices=["async", "sync"], default="sync", help="async: never wait for a nowcast")
    parser.add_argument("--period-steps", type=int, default=50, help="steps between nowcasts")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--stage", type=int, default=2, help="ZeRO stage")
    parser.add_argument("--local_rank", type=int, default=0, help="the launcher's")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": 32,
            "zero_optimization": {"stage": args.stage},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "nowcaster": {
                "endpoint": args.endpoint,
                "predictor": args.predictor,
                "mode": args.mode,
                "period_steps": args.period_steps,
            },
        },
    )
    engine = sidecast.attach(engine)

    generator = torch.Generator().manual_seed(engine.global_rank)
    for step in range(1, args.max_steps + 1):
        inputs = torch.randn(32, 16, generator=generator).to(engine.device)
        loss = (engine(inputs) - inputs.square().mean(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.step()
        if step % 50 == 0 and engine.global_rank == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    hook = sidecast.hook_of(engine)
    if hook is not None:
        summary = hook.summary()
        hook.close()
        if engine.global_rank == 0:
            print(f"{summary['num_applied']} nowcasts applied, {summary['num_rolled_back']} of them undone")
    engine.destroy()


if __name__ == "__main__":
    main()
