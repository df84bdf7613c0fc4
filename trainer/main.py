"""The training job: ``deepspeed --module sidecast.trainer.main [options]``."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed import DeepSpeedConfig, DeepSpeedConfigError
from pydantic import ValidationError

import sidecast
from sidecast.errors import ConfigError, SidecastError, one_line
from sidecast.trainer.job import checkpoints
from sidecast.trainer.job.config import JobConfig, load_config, parse_override
from sidecast.trainer.job.corpus import Corpus, load_corpus
from sidecast.trainer.job.data import DataOrder
from sidecast.trainer.job.loop import TrainingLoop
from sidecast.trainer.job.models import build_model
from sidecast.trainer.job.parent_death import die_with_parent
from sidecast.trainer.job.progress import ProgressBar
from sidecast.trainer.job.run_log import RunLog, Sink
from sidecast.trainer.job.schedules import lr_scheduler

EXIT_REFUSED = 2
# Flag, the key that it sets, its type and its help; everything else is reached with --set.
FLAGS: tuple[tuple[str, str, type, str], ...] = (
    ("--run-dir", "training.run_dir", str, "where metrics and checkpoints go"),
    ("--steps", "training.steps", int, "optimizer steps of the whole run"),
    ("--seed", "training.seed", int, "decides weights, data order and dropout"),
    ("--corpus", "training.data.corpus", str, "'stdlib', a text file or directory, or hf:DATASET"),
    ("--tokenizer", "training.data.tokenizer", str, "'bytes', or a Hugging Face tokenizer (name or directory)"),
    ("--sequence-length", "training.data.sequence_length", int, "tokens that one sample predicts"),
    ("--model", "training.model.source", str, "a Hugging Face model directory or config.json; default: a small Llama"),
    ("--lr", "optimizer.params.lr", float, "peak learning rate"),
    ("--schedule", "training.schedule.kind", str, "constant, cosine or wsd"),
    ("--warmup-steps", "training.schedule.warmup_steps", int, "steps of rising learning rate"),
    ("--decay-steps", "training.schedule.decay_steps", int, "steps of the final decay (wsd)"),
    ("--zero-stage", "zero_optimization.stage", int, "ZeRO stage, 0 to 3"),
    ("--micro-batch-size", "train_micro_batch_size_per_gpu", int, "samples per rank and forward pass"),
    ("--gradient-accumulation-steps", "gradient_accumulation_steps", int, "forward passes per optimizer step"),
    ("--gradient-clipping", "gradient_clipping", float, "largest norm of the gradient; 0 for no limit"),
    ("--checkpoint-interval-steps", "training.checkpoint_interval_steps", int, "save every so many steps"),
    ("--resume", "training.resume", str, "directory of checkpoints to continue from"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one rank of the job; the launcher starts one per device.

    Returns:
        Exit status: 0, or 2 for settings that were refused before the first step.
    """
    arguments = _parser().parse_args(argv)
    die_with_parent()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        train(load_config(arguments.config, _overrides(arguments)))
    except SidecastError as error:
        # Every rank refuses the same settings; one line is enough for that. Anything else is the rank's own.
        if arguments.local_rank == 0 or not isinstance(error, ConfigError):
            sys.stderr.write(f"sidecast: error: {error}\n")
        return EXIT_REFUSED
    return 0


def train(config: JobConfig) -> None:
    """Trains as configured, together with the other ranks that the launcher started.

    Raises:
        SidecastError: Something that the user gave cannot be used; raised before the first step.
    """
    training = config.training
    corpus = load_corpus(training.data)
    model = build_model(
        training.model,
        vocab_size=corpus.vocab_size,
        sequence_length=training.data.sequence_length,
        seed=training.seed,
    )
    deepspeed.init_distributed(verbose=False)
    with ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        ds_config = dict(config.deepspeed)
        _check_deepspeed_config(ds_config)
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            config=ds_config,
            lr_scheduler=lr_scheduler(training.schedule, training.steps),
        )
        order = DataOrder(
            corpus=corpus,
            seed=training.seed,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            micro_batch_size=engine.train_micro_batch_size_per_gpu(),
            num_micro_batches=engine.gradient_accumulation_steps(),
            sequence_length=training.data.sequence_length,
        )
        identity = _identity(config, corpus, order)
        if training.resume is not None:
            checkpoints.check_resumable(Path(training.resume), identity)
        nowcaster = _attach(engine, config, stack)
        start_step = 0
        if training.resume is not None:
            start_step = checkpoints.resume(engine, Path(training.resume), identity, training.steps)
        sinks: list[Sink] = []
        if dist.get_rank() == 0:
            resumed_from = start_step if training.resume is not None else None
            sinks.append(stack.enter_context(RunLog(Path(training.run_dir), resumed_from)))
            bar = ProgressBar("training", training.steps, sys.stderr)
            stack.callback(bar.close)
            sinks.append(bar)
        _emit(sinks, _run_record(config, model, order, start_step))
        if nowcaster is not None and sinks:
            nowcaster.add_listener(lambda event: _emit(sinks, _nowcast_record(event)))
        loop = TrainingLoop(engine, training, order, identity, sinks)
        loop.run(start_step)
        summaries = _gather_summaries(nowcaster, order.world_size)
        _emit(sinks, {"kind": "summary", "training_s": loop.training_s, "nowcaster": summaries})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed --num_gpus N --module sidecast.trainer.main",
        description="Trains a causal language model with DeepSpeed, with nowcasts if the configuration has a "
        "'nowcaster' section. Options override the configuration.",
    )
    parser.add_argument(
        "--config",
        "--deepspeed_config",
        default="default",
        metavar="FILE",
        help="DeepSpeed configuration (JSON) with our sections 'training' and 'nowcaster', or the name of one that "
        "ships with the package: default, demo (default: %(default)s)",
    )
    for flag, key, kind, text in FLAGS:
        parser.add_argument(flag, dest=key, type=kind, metavar=kind.__name__.upper(), help=f"{text} [{key}]")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="KEY=VALUE",
        help="set any key of the configuration, e.g. nowcaster.period_steps=200 (VALUE is JSON, or else text)",
    )
    # DeepSpeed's launcher gives both, torchrun the variable alone.
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    parser.add_argument("--local_rank", type=int, default=local_rank, help=argparse.SUPPRESS)
    return parser


def _assignment(text: str) -> tuple[str, Any]:
    try:
        return parse_override(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _overrides(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    given = [(key, getattr(arguments, key)) for _, key, _, _ in FLAGS]
    return [(key, value) for key, value in given if value is not None] + arguments.set


def _check_deepspeed_config(ds_config: dict[str, Any]) -> None:
    try:
        DeepSpeedConfig(ds_config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"DeepSpeed refuses the configuration: {error.title} {key} = {first['input']!r}: {first['msg']}"
        ) from error
    except (DeepSpeedConfigError, AssertionError, ValueError) as error:
        raise ConfigError(f"DeepSpeed refuses the configuration: {one_line(error)}") from error


def _attach(engine: Any, config: JobConfig, stack: ExitStack) -> Any:
    section = config.deepspeed.get("nowcaster")
    if section is None or section.get("enabled") is False:
        return None
    from sidecast.trainer.integrations.deepspeed import hook_of

    nowcaster = hook_of(sidecast.attach(engine))
    if nowcaster is not None:
        stack.callback(nowcaster.close)
    return nowcaster


def _identity(config: JobConfig, corpus: Corpus, order: DataOrder) -> dict[str, Any]:
    return {
        "seed": order.seed,
        "corpus_digest": corpus.digest,
        "sequence_length": order.sequence_length,
        "micro_batch_size": order.micro_batch_size,
        "gradient_accumulation_steps": order.num_micro_batches,
        "num_ranks": order.world_size,
        "zero_stage": config.deepspeed.get("zero_optimization", {}).get("stage", 0),
    }


def _run_record(config: JobConfig, model: torch.nn.Module, order: DataOrder, start_step: int) -> dict[str, Any]:
    return {
        "kind": "run",
        "start_step": start_step,
        "num_ranks": order.world_size,
        "num_parameters": sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.parameters()),
        "num_train_tokens": len(order.corpus.train_tokens),
        "num_validation_tokens": len(order.corpus.validation_tokens),
        "num_threads": torch.get_num_threads(),
        "training": dataclasses.asdict(config.training),
        "deepspeed": dict(config.deepspeed),
        "machine": {"system": platform.platform(), "num_cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("sidecast", "torch", "deepspeed", "transformers")},
        },
    }


def _nowcast_record(event: Any) -> dict[str, Any]:
    return {"kind": "nowcast", "step": event.step, "event": event.kind, "details": dict(event.details)}


def _gather_summaries(nowcaster: Any, world_size: int) -> list[dict[str, Any]] | None:
    if nowcaster is None:
        return None
    summaries: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(summaries, dict(nowcaster.summary()))
    return summaries


def _emit(sinks: Sequence[Sink], record: dict[str, Any]) -> None:
    for sink in sinks:
        sink(record)


if __name__ == "__main__":
    sys.exit(main())
