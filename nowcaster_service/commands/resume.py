"""``sidecast resume``: see ``pause``."""

from __future__ import annotations

import argparse

from sidecast.nowcaster_service.commands.pause import add_parser_of


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add_parser_of(
        subparsers,
        "resume",
        "let a paused job apply jumps or pushes again",
        "From the run's next vote on, all ranks apply jumps or pushes again, as before `sidecast pause`.",
    )
