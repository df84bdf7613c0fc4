"""Read-outs of a training loop: its own states averaged, its weights as if nothing were attached, then exported."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sidecast
from sidecast.commands.__main__ import main
from sidecast.policies.read_outs import read_out_of
from tests.support.local_engines import LocalEngines
from tests.support.services.harness import RunningService

INTERVAL_STEPS = 5
NUM_STEPS = 30
ALONE = {"policy": "push", "push": {"interval_steps": INTERVAL_STEPS, "gain": 0}}
JUMPS = {"period_steps": 2 * INTERVAL_STEPS, "context_len": 2, "rollback": "off"}


def new_training() -> tuple[LlamaForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def train(model: Any, optimizer: torch.optim.Optimizer, first_step: int = 1) -> dict[int, dict[str, torch.Tensor]]:
    """Returns the states at snapshot steps, which are taken before anything is applied."""
    states = {}
    for step in range(first_step, NUM_STEPS + 1):
        tokens = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(step))
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % INTERVAL_STEPS == 0:
            states[step] = {name: item.detach().clone() for name, item in model.named_parameters()}
    return states


async def all_averaged(service: RunningService, step: int) -> None:
    (session,) = [session for session, _ in service.servicer.sessions.items()]
    while not all(item.step == step for item in session.read_outs.averages.values()):
        await asyncio.sleep(0.001)


async def resumed(service: RunningService, run_id: str, before: str) -> None:
    """Returns once the run has another session than the one before."""
    ids: list[str] = []
    while not ids or before in ids:
        await asyncio.sleep(0.001)
        sessions = [session.settings for session, _ in service.servicer.sessions.items()]
        ids = [settings.session_id for settings in sessions if settings.run_id == run_id]


def expected(states: dict[int, dict[str, torch.Tensor]], name: str) -> dict[str, torch.Tensor]:
    read_out, before = read_out_of(name), 0
    average: dict[str, torch.Tensor] = {}
    for step, state in states.items():
        share = read_out.share(0, before, step)
        for key, value in state.items():
            average[key] = value.double() if not before else average[key] + share * (value.double() - average[key])
        before = step
    return average


def test_a_loop_is_averaged_and_exported_and_trains_as_if_nothing_were_there(tmp_path: Path) -> None:
    plain, plain_optimizer = new_training()
    train(plain, plain_optimizer)
    model, optimizer = new_training()
    with RunningService(tmp_path / "service", engines=LocalEngines()) as service:
        settings = {
            **ALONE,
            "endpoint": service.endpoint,
            "mode": "sync",
            "read_outs": ["ema20", "wsm@0"],
            "run_file": str(tmp_path / "run.json"),
        }
        sidecast.attach(model, optimizer, settings)
        states = train(model, optimizer)
        service.call(all_averaged(service, NUM_STEPS))
        for name in ("ema20", "wsm@0"):
            out = tmp_path / name
            assert main(["export", str(tmp_path / "run.json"), "--read-out", name, "--out", str(out)]) == 0
            loaded = AutoModelForCausalLM.from_pretrained(out)
            for key, value in expected(states, name).items():
                torch.testing.assert_close(dict(loaded.named_parameters())[key].double(), value, rtol=0, atol=1e-6)
        hook = sidecast.hook_of(model)
        assert hook is not None
        assert hook.summary()["num_applied"] == 0
        hook.close()
    for name, value in plain.named_parameters():
        assert torch.equal(value, dict(model.named_parameters())[name])


@pytest.mark.parametrize("section", [ALONE, JUMPS], ids=["alone", "jumps"])
def test_a_resumed_loop_goes_on_with_its_read_outs(tmp_path: Path, section: dict[str, Any]) -> None:
    with RunningService(tmp_path / "service", engines=LocalEngines()) as service:
        settings = {
            **section,
            "endpoint": service.endpoint,
            "mode": "sync",
            "read_outs": ["ema20"],
            "run_file": str(tmp_path / "run.json"),
        }
        model, optimizer = new_training()
        sidecast.attach(model, optimizer, settings)
        train(model, optimizer)
        service.call(all_averaged(service, NUM_STEPS))
        session_id = next(session.settings.session_id for session, _ in service.servicer.sessions.items())
        sidecast.save_nowcasting(model, tmp_path / "checkpoint")
        saved = model.state_dict(), optimizer.state_dict()
        first = json.loads((tmp_path / "run.json").read_text())
        hook = sidecast.hook_of(model)
        assert hook is not None
        hook.close()

        model, optimizer = new_training()
        sidecast.attach(model, optimizer, settings)
        assert json.loads((tmp_path / "run.json").read_text())["run_id"] != first["run_id"]
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        sidecast.resume_nowcasting(model, tmp_path / "checkpoint")
        # The file names the run that goes on, with its own secret.
        assert json.loads((tmp_path / "run.json").read_text()) == first
        out = tmp_path / "model"
        service.call(resumed(service, first["run_id"], session_id))
        state_file = tmp_path / "checkpoint" / "sidecast_state.json"
        arguments = ["--endpoint", service.endpoint, "--read-out", "ema20", "--out", str(out)]
        assert main(["export", str(state_file), *arguments]) == 0
        hook = sidecast.hook_of(model)
        assert hook is not None
        hook.close()
        sessions = [session for session, _ in service.servicer.sessions.items()]
        averages = {session.settings.run_id: session.read_outs.averages for session in sessions}
        assert averages[first["run_id"]]["ema20"].num_snapshots == NUM_STEPS // INTERVAL_STEPS
