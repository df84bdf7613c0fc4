"""One of two ranks that "train" a fake partition under the hook; writes what happened as JSON.

Usage: RANK=... python hook_worker.py FOLDER ENDPOINT
"""

from __future__ import annotations

import gc
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sidecast.errors import ConfigError
from sidecast.manifest import ModelManifest, ParameterSpec
from sidecast.protos.shards import ShardSpec
from sidecast.trainer.hook.attachment import load_rollback_copy, rollback_path
from sidecast.trainer.hook.boundary import NowcastHook
from sidecast.trainer.hook.config import NowcasterConfig
from sidecast.trainer.hook.ranks import Ranks
from sidecast.trainer.hook.replay import Replayer
from sidecast.trainer.hook.rollback_memory import reserve_rollback_copy
from sidecast.trainer.hook.vote import NO_VERSION, Ballot, VoteBox
from sidecast.trainer.partitions import RollbackCopy, StalePartitionError
from sidecast.trainer.partitions.rollback import packed_bytes
from sidecast.trainer.pipe.messages import Connected, Prediction, Sent
from tests.support.courier_harness import PacedCourier, session, settings, start_courier, until

NUM_ELEMENTS = 10
MANIFEST = ModelManifest.from_shapes([("w", (NUM_ELEMENTS,))], {"model_type": "toy"})
SHARDS = {0: [(0, 0, 6)], 1: [(0, 6, 10)]}


class FakePartition:
    """A rank's part of one vector; "training" moves it by a step-dependent amount."""

    def __init__(self, rank: int) -> None:
        self.parameters: tuple[ParameterSpec, ...] = MANIFEST.parameters
        self.aliases: Mapping[str, str] = {}
        self.has_replicas = False
        self.upload_shards = self.owned_shards = tuple(ShardSpec(*shard) for shard in SHARDS[rank])
        self.master_dtype = torch.float32
        self.device = torch.device("cpu")
        (shard,) = self.owned_shards
        self.weights = torch.arange(shard.start, shard.stop, dtype=torch.float32)
        self.rates: tuple[float, ...] = (0.5,)
        self.moved_steps: Collection[int] = ()
        self.is_moved = False

    def train(self, step: int) -> None:
        self.weights += 0.01 * math.sin(step) - 0.001 * self.weights
        self.is_moved = step in self.moved_steps

    def learning_rates(self) -> tuple[float, ...]:
        return self.rates

    def require_current(self) -> None:
        if self.is_moved:
            raise StalePartitionError("somebody moved it")

    def read(self, out: Tensor, stream: None = None) -> None:
        out.copy_(self.weights)

    def apply(self, delta: Tensor, weight: float, **_: Any) -> None:
        self.weights += weight * delta

    def capture(self, copy: RollbackCopy) -> None:
        copy.save({"weights": self.weights}, {})

    def require_restorable(self, copy: RollbackCopy) -> None:
        self.require_current()

    def restore(self, copy: RollbackCopy) -> None:
        self.weights.copy_(copy.tensors()["weights"])

    def rollback_bytes(self) -> int:
        return packed_bytes([self.weights.nbytes])


class Run:
    """One short run of one rank."""

    def __init__(self, rank: int, folder: Path, endpoint: str, group: dist.ProcessGroup) -> None:
        self.rank, self.folder, self.endpoint, self.group = rank, folder, endpoint, group

    def __call__(
        self,
        name: str,
        num_steps: int,
        *,
        loss_at: Callable[[int, int], float] = lambda step, num_jumps: 1.0,
        arrivals: Collection[int] = (),
        moved_steps: Collection[int] = (),
        close_step: int = 0,
        later_rate: float = 0.5,
        **changes: Any,
    ) -> dict[str, Any]:
        """Trains.

        Args:
            name: Of the run and session.
            num_steps: How long.
            loss_at: Loss by step and number of jumps so far.
            arrivals: The steps at which this rank gets its predictions.
            later_rate: This rank's learning rate from step 21 on; 0.5 before.
            close_step: After which rank 0 closes its hook; 0: never.
            moved_steps: The steps at which this rank's tensors are not where they were.
            changes: Settings of the hook.
        """
        config = NowcasterConfig(context_len=2, period_steps=20, vote_interval_steps=1, probation_steps=12, **changes)
        of_rank = settings(
            self.endpoint,
            MANIFEST,
            SHARDS[self.rank],
            rank=self.rank,
            world_size=2,
            record_dir=self.folder / name,
        )
        partition = FakePartition(self.rank)
        partition.moved_steps = moved_steps
        courier = start_courier(of_rank, session(name, name), PacedCourier, config.num_slots)
        assert isinstance(courier, PacedCourier)
        courier.is_pacing = config.mode == "async"
        until(courier, Connected)
        dist.barrier(self.group)
        hook = NowcastHook(
            config,
            partition,
            courier,
            VoteBox(self.group),
            step=0,
            run_id=name,
            rollback_copy=reserve_rollback_copy(config, partition),
        )
        events: list[Any] = []
        hook.add_listener(lambda event: events.append([event.kind, event.step, dict(event.details)]))
        weights = []
        for step in range(1, num_steps + 1):
            partition.train(step)
            partition.rates = (0.5 if step <= 20 else later_rate,)
            hook.observe(loss_at(step, hook.totals.num_applied))
            if step in arrivals:
                courier.wait_for = Prediction
            uploaded_bytes = hook.totals.bytes_uploaded
            hook.after_step(step)
            while (
                not hook.is_closed
                and config.mode == "async"
                and step % 10 == 0
                and hook.totals.bytes_uploaded == uploaded_bytes
            ):
                # Takes the couriers' speed out of the race: on only once this rank's part is with the service.
                courier.wait_for = Sent
                hook._inbox.poll()
            weights.append(partition.weights.tolist())
            if step == close_step and self.rank == 0:
                hook.close()
        summary = hook.summary()
        hook.close()
        return {"events": events, "weights": weights, "summary": summary}

    def replay(self, name: str, num_steps: int) -> list[list[float]]:
        """Repeats a run's jumps without its courier."""
        partition = FakePartition(self.rank)
        replayer = Replayer(self.folder / name, partition, rank=self.rank, step=0)
        weights = []
        for step in range(1, num_steps + 1):
            partition.train(step)
            replayer.after_step(step)
            weights.append(partition.weights.tolist())
        return weights


def votes(group: dist.ProcessGroup, rank: int) -> list[Any]:
    """One unanimous vote, one split, one cast by nobody else."""
    box = VoteBox(group)
    decisions = []
    for ballot in (Ballot(3, 77, 1, 1.5 + rank, 2), Ballot(3, 77 + rank, 1, 0.0, 0), Ballot()):
        box.launch(ballot)
        decision = box.read()
        decisions.append([decision.version, decision.digest, decision.epoch, decision.mean_loss, decision.num_losses])
    assert decisions[1][0] == NO_VERSION
    return decisions


def departures(group: dist.ProcessGroup, rank: int) -> list[Any]:
    """What rank 1 finds, and how far it gets, where rank 0 leaves: between votes, before a confirmation, with it."""
    found: list[Any] = []
    for is_vote_open in (False, True):
        box = VoteBox(group)
        if is_vote_open:
            box.launch(Ballot(3, 77, 1))
        if rank == 0:
            box.leave(30.0)
        elif is_vote_open:
            found.append([box.read().version, box.left_rank, box.confirm(True), box.left_rank])
        else:
            box.launch(Ballot(3, 77, 1))
            found.append([box.read().version, box.left_rank])
        box.launch(Ballot())
        found.append([box.is_open, box.confirm(True)])
    box = VoteBox(group)
    box.launch(Ballot(3, 77, 1))
    box.leave(30.0)
    return [*found, box.left_rank]


def held_things() -> tuple[int, int]:
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def leftovers() -> list[tuple[int, int]]:
    """Descriptors and threads after each of a few groups of ranks that have begun, voted and ended."""
    seen = []
    for _ in range(6):
        votes = Ranks.of_world().votes()
        votes.launch(Ballot())
        votes.read()
        votes.leave(30.0)
        gc.collect()
        seen.append(held_things())
    return seen


def refusal(group: dist.ProcessGroup, rank: int) -> str:
    """What this rank raises where only rank 1 has reason to."""
    try:
        with Ranks(group).refused_together():
            if rank == 1:
                raise ConfigError("rank 1 lacks the memory")
    except ConfigError as error:
        return str(error)
    return ""


class OnProbation:
    """A hook that has resumed with a jump on probation."""

    def __init__(self) -> None:
        self.is_on_probation = True
        self.copy = RollbackCopy.allocate(64)

    def load_rollback_copy(self, state: Mapping[str, Any]) -> None:
        self.copy.load_state_dict(state)

    def end_probation(self) -> None:
        self.is_on_probation = False


def probations(group: dist.ProcessGroup, rank: int, folder: Path) -> list[bool]:
    """Whether a jump stays on probation with all rollback copies whole, and with rank 1's cut off."""
    copy = RollbackCopy.allocate(64)
    copy.save({"weights": torch.ones(2)}, {})
    results = []
    for cut in (False, True):
        path = rollback_path(folder, rank)
        torch.save(copy.state_dict(), path)
        if cut and rank == 1:
            path.write_bytes(path.read_bytes()[:100])
        hook = OnProbation()
        load_rollback_copy(hook, folder, None, Ranks(group))  # type: ignore[arg-type]
        results.append(hook.is_on_probation)
    return results


def main(rank: int, folder: Path, endpoint: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    run = Run(rank, folder, endpoint, group)
    # One rank hears of the prediction two steps after the other.
    late = {21 + 2 * rank}
    results = {
        "votes": votes(group, rank),
        "departures": departures(group, rank),
        "leftovers": leftovers(),
        "refusal": refusal(group, rank),
        "probations": probations(group, rank, folder),
        "accepted": run("accepted", 40, arrivals=late),
        "harmful": run(
            "harmful",
            85,
            arrivals=late | {62},
            loss_at=lambda step, num_jumps: 1.0 + 5.0 * num_jumps,
            max_rollbacks=2,
        ),
        "nan": run("nan", 30, arrivals=late, loss_at=lambda step, num_jumps: math.nan if num_jumps else 1.0),
        # From here on rank 1's optimizer is elsewhere at times.
        "moved-at-vote": run("moved-at-vote", 30, arrivals={21}, moved_steps=rank * [21, 22, 23]),
        "moved-at-jump": run("moved-at-jump", 30, arrivals={21}, moved_steps=rank * [22]),
        "moved-at-rollback": run(
            "moved-at-rollback",
            40,
            arrivals={21},
            loss_at=lambda step, num_jumps: 1.0 + 5.0 * num_jumps,
            moved_steps=rank * [34, 35],
        ),
        # A schedule that looks at a rank's own loss may leave ranks with unequal rates.
        "decaying": run("decaying", 30, arrivals={21}, later_rate=0.25 if rank else 0.4),
        "stale": run("stale", 35, arrivals={30}),
        "sync": run("sync", 25, mode="sync"),
        # With the vote open that decides on a prediction, and with a jump on probation.
        "closed-by-one-at-vote": run("closed-by-one-at-vote", 30, arrivals={21}, close_step=21),
        "closed-by-one-on-probation": run(
            "closed-by-one-on-probation",
            40,
            arrivals={21},
            close_step=25,
            loss_at=lambda step, num_jumps: 1.0 + 5.0 * num_jumps,
        ),
    }
    results["replayed"] = run.replay("harmful", 85)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.barrier(group)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(os.environ["RANK"]), Path(sys.argv[1]), sys.argv[2])
