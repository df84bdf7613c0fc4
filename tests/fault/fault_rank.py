"""One of two ranks that train for real, with DeepSpeed, the hook and a courier, through one fault after another."""

from __future__ import annotations

import math
import os
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from zlib import crc32

import deepspeed
import torch
import torch.distributed as dist
from faults import CONTEXT_LEN, INTERVAL_STEPS, PERIOD_STEPS, Fault, Phase
from torch import Tensor, nn

import sidecast
from sidecast.errors import ConfigError
from sidecast.protos.shards import ShardSpec, total_elements
from sidecast.trainer.hook.reporting import NowcastEvent
from sidecast.trainer.hook.vote import NO_VERSION, Ballot, Decision, VoteBox
from sidecast.trainer.integrations.deepspeed import hook_of
from sidecast.trainer.partitions import Partition
from sidecast.trainer.partitions.deepspeed import layout_of
from tests.support.pacing import Pacer

WORLD_SIZE = 2
# Two matrices: a rank's part of them are several of the smallest chunks that a service sends.
WIDTH = 256
MAX_STEPS = 20_000
TOLD = ("applied", "dropped", "rejected", "failed", "connected", "disconnected", "suspended")


@dataclass
class Passage:
    """How a rank came through one fault.

    Attributes:
        first_step: Steps made before.
        last_step: Steps made at the end.
        healing_step: From where on all was to be well again; None if it never was.
        losses_are_finite: All of them.
        slowest_step_s: The longest time from one step to the next.
        applied: The jumps: version, digest, step, base_step, checksum of what was added, and state_error: how
            far the states that the service predicted from were from this rank's at their steps, as a share of what had
            changed.
        reasons: What was told of things that went wrong.
        weights: Checksum of the whole model, as this rank has it.
        masters_are_published: Whether this rank's masters are what the model has.
    """

    first_step: int
    last_step: int = 0
    healing_step: int | None = None
    losses_are_finite: bool = True
    slowest_step_s: float = 0.0
    applied: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    weights: int = 0
    masters_are_published: bool = False


class TrainingRank:
    """One rank.

    Args:
        rank: Its number.
        folder: Where ranks meet, and for the apply log.
        endpoint: Of the service.
        link: To the conductor.
        progress: Steps made by each rank, shared with the conductor.
        transfers: How snapshots and predictions travel: settings of the hook.
    """

    def __init__(
        self, rank: int, folder: Path, endpoint: str, link: Connection, progress: Any, transfers: Mapping[str, str]
    ) -> None:
        self.rank = rank
        self._published = folder / "published"
        self._states: dict[int, tuple[int, Tensor]] = {}
        self._link = link
        self._progress = progress
        self._fault: Fault | None = None
        self._passage = Passage(0)
        self._section = {
            "endpoint": endpoint,
            "context_len": CONTEXT_LEN,
            "period_steps": PERIOD_STEPS,
            "vote_interval_steps": 1,
            "probation_steps": 9,
            # Whether jumps pay is not the question here.
            "acceptance_sigmas": 1e9,
            "max_relative_norm": 10.0,
            "max_weight": 0.1,
            "record_dir": str(folder / "record"),
            "timeouts": {"connect_s": 0.4, "chunk_s": 2.0, "stream_s": 4.0},
            **transfers,
        }
        self.engine = sidecast.attach(self._new_engine())
        self.hook = hook_of(self.engine)
        assert self.hook is not None
        self.hook.add_listener(self._on_event)
        self._pacer = Pacer.of_group(self.hook)
        self._watch_votes()
        self._watch_jumps()

    def _new_engine(self) -> Any:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
            "nowcaster": self._section,
        }
        engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
        return engine

    # --- what happens meanwhile

    def _on_event(self, event: NowcastEvent) -> None:
        if event.kind == "staged":
            self._keep_state(event.step)
        if event.kind == "applied":
            digest, base_step = str(event.details["digest"]), int(event.details["base_step"])
            error = self._state_error(digest, base_step)
            jump = {"step": event.step, "delta": self._delta_checksum, "state_error": error}
            self._passage.applied.append({**event.details, **jump})
        if "reason" in event.details and event.kind != "accepted":
            self._passage.reasons.append(f"{event.kind}: {event.details['reason']}")
        if event.kind in TOLD:
            self._link.send(("event", event.kind, event.step, dict(event.details)))

    def _keep_state(self, step: int) -> None:
        masters = torch.empty(total_elements(self.hook.shards[0]))
        self._partition().read(masters)
        self._states[step] = self.hook.epoch, masters
        # Nothing older is ever applied: it would be too stale.
        for known in [item for item in self._states if item < step - 10 * PERIOD_STEPS]:
            del self._states[known]

    def _partition(self) -> Partition:
        return Partition(lambda: layout_of(self.engine))

    def _state_error(self, digest: str, base_step: int) -> float:
        """How far the states that the service made a prediction from are from what this rank staged, at most.

        As a share of the largest change of any element since an earlier state of the epoch, which is what travelled:
        how many snapshots were lost before, and so how large it is, depends on how long the fault took.
        """
        offsets = [0]
        for spec in self.hook.parameters:
            offsets.append(offsets[-1] + spec.numel)
        path = self._published / f"{digest}-states.f32"
        window = torch.from_file(str(path), size=CONTEXT_LEN * offsets[-1]).view(CONTEXT_LEN, -1)
        errors = []
        for index, held in enumerate(window):
            parts = [held[offsets[item.parameter] :][item.start : item.stop] for item in self.hook.shards[0]]
            step = base_step - (CONTEXT_LEN - 1 - index) * INTERVAL_STEPS
            epoch, staged = self._states[step]
            earlier = [
                state for known, (its_epoch, state) in self._states.items() if known < step and its_epoch == epoch
            ]
            error = float((torch.cat(parts) - staged).abs().max())
            change = max((float((staged - state).abs().max()) for state in earlier), default=0.0)
            errors.append(error / change if change else error)
        return max(errors)

    def _watch_jumps(self) -> None:
        apply = Partition.apply

        def applying(partition: Partition, delta: Tensor, *args: Any, **settings: Any) -> None:
            self._delta_checksum = crc32(delta.numpy().tobytes())
            apply(partition, delta, *args, **settings)

        Partition.apply = applying  # type: ignore[method-assign]

    def _watch_votes(self) -> None:
        launch, read = VoteBox.launch, VoteBox.read

        def launching(box: VoteBox, ballot: Ballot) -> None:
            if ballot.version != NO_VERSION:
                self._reach_vote("before")
            launch(box, ballot)
            if ballot.version != NO_VERSION:
                self._reach_vote("during")

        def reading(box: VoteBox) -> Decision:
            decision = read(box)
            if decision.version != NO_VERSION:
                self._reach_vote("after")
            return decision

        VoteBox.launch, VoteBox.read = launching, reading  # type: ignore[method-assign]

    def _reach_vote(self, phase: Phase) -> None:
        fault = self._fault
        if fault is not None and (fault.call, fault.phase, fault.rank) == ("Vote", phase, self.rank):
            self._fault = None
            self._link.send(("fired",))
            while self._link.recv() != "go":
                pass

    # --- commands

    def serve(self) -> None:
        """Does what the conductor asks for until it goes away."""
        self._link.send(("ready", self.shards, list(self.hook.parameters)))
        while (command := self._link.recv()) is not None:
            what, of_what = command
            self._link.send(("done", self.train(of_what) if what == "train" else self.attach_without_memory(of_what)))
        self.hook.close()
        dist.destroy_process_group()

    @property
    def shards(self) -> Sequence[ShardSpec]:
        """What this rank owns."""
        return self.hook.shards[1]

    def train(self, fault: Fault | None) -> Passage:
        """Trains until a nowcast has been applied whose base is of after the conductor's word that all may heal."""
        self._fault = fault
        passage = self._passage = Passage(self.engine.global_steps)
        may_heal = torch.zeros(1, dtype=torch.int32)
        step_seconds: list[float] = []
        while self.engine.global_steps < passage.first_step + MAX_STEPS:
            started_s = time.perf_counter()
            passage.losses_are_finite &= math.isfinite(self._step())
            step_seconds.append(time.perf_counter() - started_s)
            if passage.healing_step is not None or fault is None or not fault.is_outrun:
                self._pacer.wait()
            step = self._progress[self.rank] = self.engine.global_steps
            if passage.healing_step is None:
                may_heal[0] = int(self._link.poll() and self._link.recv() == "heal") or int(may_heal[0] > 0)
                is_agreed = may_heal.clone()
                dist.all_reduce(is_agreed, dist.ReduceOp.MIN)
                if is_agreed:
                    passage.healing_step = step
            elif any(jump["base_step"] >= passage.healing_step for jump in passage.applied):
                break
        passage.last_step = self.engine.global_steps
        passage.slowest_step_s = max(step_seconds)
        passage.weights, passage.masters_are_published = self._state()
        return passage

    def _step(self) -> float:
        generator = torch.Generator().manual_seed(2 * self.engine.global_steps + self.rank)
        inputs = torch.randn(2, WIDTH, generator=generator)
        loss = (self.engine(inputs) - inputs.roll(1, dims=1)).square().mean()
        self.engine.backward(loss)
        self.engine.step()
        return loss.item()

    def _state(self) -> tuple[int, bool]:
        parameters = [parameter.detach().reshape(-1) for parameter in self.engine.module.parameters()]
        partition = self._partition()
        masters = torch.empty(total_elements(partition.upload_shards))
        partition.read(masters)
        published = torch.cat([parameters[item.parameter][item.start : item.stop] for item in partition.upload_shards])
        return crc32(torch.cat(parameters).numpy().tobytes()), torch.equal(masters, published)

    def attach_without_memory(self, limited_rank: int) -> str:
        """Attaches another engine while one rank cannot have large files, which shared memory is made of."""
        engine = self._new_engine()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.rank == limited_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
        try:
            sidecast.attach(engine)
        except ConfigError as error:
            return str(error)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return ""


def train(
    rank: int, folder: Path, endpoint: str, link: Connection, progress: Any, transfers: Mapping[str, str]
) -> None:
    """Runs a rank as the process of its own that it is."""
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD_SIZE)
    # Compiling DeepSpeed's shared-memory operator would take longer than everything else here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    TrainingRank(rank, folder, endpoint, link, progress, transfers).serve()
