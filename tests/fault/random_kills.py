"""Services that are killed again and again, at moments that a seed chooses, under a run that does not let go.

    python -m tests.fault.random_kills --kills 200

What the run is given has to be what it would have been given by a service that lives, bit for bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tests.support.services.mortal import MortalService
from tests.support.services.steadfast_run import KINDS, Given, SteadfastRun

# About as many as a service that takes two snapshots sees: most lives end before the run does.
MAX_EVENTS = 40


@dataclass(frozen=True)
class KilledRun:
    """What became of one run.

    Attributes:
        given: What it was given.
        num_kills: How many services have died under it.
    """

    given: Given
    num_kills: int


def lives(seed: int) -> Iterator[tuple[str, int]]:
    """How one service after another dies, without end."""
    generator = random.Random(seed)
    while True:
        yield "at an event", generator.randint(1, MAX_EVENTS)


def run_unharmed(kind: str) -> Given:
    """What a run is given by a service that lives.

    Args:
        kind: Of ``KINDS``.
    """
    return _run(kind, iter([("", 0)])).given


def run_killed(kind: str, seed: int) -> KilledRun:
    """Trains under services of which each is killed, until the run ends before one is.

    Args:
        kind: Of ``KINDS``.
        seed: Of the moments.
    """
    return _run(kind, lives(seed))


def _run(kind: str, deaths: Iterator[tuple[str, int]]) -> KilledRun:
    service = MortalService()
    try:
        service.start(*next(deaths))
        given = SteadfastRun(service, kind, deaths).train()
        return KilledRun(given, service.num_deaths)
    finally:
        service.kill()
        shutil.rmtree(service.history.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="goes on until so many services have been killed")
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next one has the next")
    arguments = parser.parse_args()
    unharmed = {kind: run_unharmed(kind) for kind in KINDS}
    seed, num_kills, num_runs = arguments.seed, 0, 0
    while num_kills < arguments.kills:
        for kind in KINDS:
            killed = run_killed(kind, seed)
            num_kills, num_runs = num_kills + killed.num_kills, num_runs + 1
            if killed.given != unharmed[kind]:
                sys.exit(f"seed {seed}, {kind}: the run was given something else after {killed.num_kills} kills")
        sys.stdout.write(f"seed {seed}: {num_kills} kills, {num_runs} runs, every prediction as without\n")
        sys.stdout.flush()
        seed += 1


if __name__ == "__main__":
    main()
