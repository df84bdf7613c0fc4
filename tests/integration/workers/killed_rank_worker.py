"""One rank of a job that loses rank 1 during a vote on a prediction, or of the job that resumes from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import deepspeed

import sidecast
from sidecast.trainer.hook.vote import NO_VERSION, Ballot, VoteBox
from sidecast.trainer.integrations.deepspeed import hook_of
from tests.integration.workers.tiny_job import new_engine, pacer_of, start_process_group, train

PERIOD_STEPS = 20
CONTEXT_LEN = 2
MAX_STEPS = 20_000


def kill_during_a_vote(folder: Path) -> None:
    """Lets this rank die once its vote on a second prediction is on its way, after the checkpoint."""
    launch = VoteBox.launch

    def launching(box: VoteBox, ballot: Ballot) -> None:
        launch(box, ballot)
        if ballot.version != NO_VERSION and (folder / "checkpoints" / "latest").exists():
            (folder / "killed.json").write_text(json.dumps({"version": ballot.version, "epoch": ballot.epoch}))
            os.kill(os.getpid(), signal.SIGKILL)

    VoteBox.launch = launching  # type: ignore[method-assign]


def main(endpoint: str, folder: Path, mode: str) -> None:
    # Compiling DeepSpeed's shared-memory operator would take longer than everything else here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank = start_process_group()
    section = {
        "endpoint": endpoint,
        "require": True,
        "context_len": CONTEXT_LEN,
        "period_steps": PERIOD_STEPS,
        "vote_interval_steps": 1,
        "probation_steps": 9,
        # Whether jumps pay is not the question here.
        "acceptance_sigmas": 1e9,
        "max_relative_norm": 10.0,
    }
    engine = sidecast.attach(new_engine(section))
    nowcaster: Any = hook_of(engine)
    jumps: list[dict[str, Any]] = []
    nowcaster.add_listener(
        lambda event: jumps.append({**event.details, "step": event.step}) if event.kind == "applied" else None
    )
    (folder / f"{mode}-courier{rank}").write_text(str(nowcaster._courier._process.pid))
    if mode == "resumed":
        engine.load_checkpoint(str(folder / "checkpoints"))
    elif rank == 1:
        kill_during_a_vote(folder)
    pacer = pacer_of(engine)
    first_step = engine.global_steps
    num_saved = 0
    for step, _ in enumerate(train(engine, rank, first_step), first_step + 1):
        pacer.wait()
        if jumps and mode == "resumed":
            break
        if jumps and num_saved == 0:
            engine.save_checkpoint(str(folder / "checkpoints"))
            (folder / f"saved{rank}").write_text(str(step))
            num_saved = 1
        assert step < MAX_STEPS, "no prediction came"
    result = {"first_step": first_step, "jumps": jumps, "run_id": nowcaster.run_id, "session_id": nowcaster.session_id}
    (folder / f"{mode}{rank}.json").write_text(json.dumps(result))
    nowcaster.close()


if __name__ == "__main__":
    main(sys.argv[-3], Path(sys.argv[-2]), sys.argv[-1])
