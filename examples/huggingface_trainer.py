"""Nowcasting in the Hugging Face Trainer, with DeepSpeed and without. Beside a running `sidecast serve`:

python examples/huggingface_trainer.py
deepspeed --num_gpus 2 examples/huggingface_trainer.py --deepspeed
"""

from __future__ import annotations

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sidecast import NowcastCallback

VOCABULARY = 64
SEQUENCE = 16


def new_model() -> LlamaForCausalLM:
    """A Llama small enough for one core."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=SEQUENCE,
        )
    )


def counting(num_sequences: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards."""
    starts = torch.arange(num_sequences).unsqueeze(1)
    return [{"input_ids": ids, "labels": ids} for ids in (starts + torch.arange(SEQUENCE)) % VOCABULARY]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--endpoint", default="127.0.0.1:50051", help="of the nowcaster service")
    parser.add_argument("--predictor", default="linear")
    # So small a model outruns its nowcasts. A real one need not wait for them: async is the setting's own default.
    parser.add_argument("--mode", choices=["async", "sync"], default="sync", help="async: never wait for a nowcast")
    parser.add_argument("--period-steps", type=int, default=50, help="steps between nowcasts")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--output-dir", default="runs/huggingface")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --output-dir")
    parser.add_argument("--deepspeed", action="store_true", help="train with ZeRO stage 2")
    parser.add_argument("--local_rank", type=int, default=0, help="the launcher's")
    args = parser.parse_args()

    zero2 = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
    }
    trainer = Trainer(
        model=new_model(),
        args=TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.max_steps,
            save_steps=args.max_steps // 2,
            logging_steps=args.max_steps // 4,
            learning_rate=3e-3,
            report_to="none",
            disable_tqdm=True,
            deepspeed=zero2 if args.deepspeed else None,
        ),
        train_dataset=counting(256),
    )
    nowcasts = NowcastCallback(
        trainer,
        {
            "endpoint": args.endpoint,
            "predictor": args.predictor,
            "mode": args.mode,
            "period_steps": args.period_steps,
        },
    )
    trainer.add_callback(nowcasts)
    trainer.train(resume_from_checkpoint=args.resume)
    summary = nowcasts.hook.summary()
    if trainer.is_world_process_zero():
        print(f"{summary['num_applied']} nowcasts applied, {summary['num_rolled_back']} of them undone")


if __name__ == "__main__":
    main()
