"""The ``sidecast`` command finds its subcommands and tells refusals in one line."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sidecast.commands.__main__ import COMMANDS, build_parser, main

ARGUMENTS = {
    "serve": [],
    "status": ["127.0.0.1:50051"],
    "export": ["run.json", "--read-out", "ema5", "--out", "model"],
    "pause": ["run.json"],
    "resume": ["run.json"],
    "predict": ["before", "now", "--out", "then"],
    "graph": ["model", "--out", "graph.html"],
    "evaluate": ["--preset", "smoke", "--out", "results"],
    "metatrain": ["--preset", "ci", "--out", "nowcasters"],
    "report": ["run"],
    "doctor": [],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_be_run(command: str) -> None:
    arguments = build_parser().parse_args([command, *ARGUMENTS[command]])
    # It is the other one, the other way round.
    assert arguments.run.__module__ == COMMANDS["pause" if command == "resume" else command]


def test_every_argument_of_export_predict_and_graph_says_what_it_is() -> None:
    for name in ("export", "predict", "graph"):
        parser = argparse.ArgumentParser()
        importlib.import_module(COMMANDS[name]).add_parser(parser.add_subparsers())
        actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        arguments = actions[0].choices[name]._actions
        assert [action.dest for action in arguments if not action.help] == []


def test_a_nowcast_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(tmp_path / f"step_{step}.safetensors") for step in (100, 200)]
    for path, value in zip(paths, (1.0, 2.0), strict=True):
        save_file({"weight": torch.full((3,), value)}, path)
    out = tmp_path / "nowcast"
    assert main(["predict", *paths, "--horizon", "2", "--out", str(out)]) == 0
    assert f"written    {out}" in capsys.readouterr().out
    assert main(["predict", *paths, "--predictor", "liner", "--out", str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sidecast: predictor is 'liner'; allowed: ")
    assert error.count("\n") == 1
