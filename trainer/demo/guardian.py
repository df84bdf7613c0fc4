"""A process that outlives its parent just long enough to end what the parent started.

It reads process groups from its standard input, ``+ID`` to guard and ``-ID`` to forget, and ends the guarded ones when
the input does: that happens with every end of the parent, also a kill that leaves it no time to clean up.
"""

from __future__ import annotations

import signal
import sys
from typing import TextIO

from sidecast.trainer.demo.process_groups import end_group


def main(orders: TextIO = sys.stdin) -> int:
    """Runs until the input ends, then ends every guarded group."""
    # Ctrl-C is for the parent to answer; we learn of its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    groups: list[int] = []
    for order in orders:
        group = int(order[1:])
        if order.startswith("+"):
            groups.append(group)
        else:
            groups.remove(group)
    for group in reversed(groups):
        end_group(group)
    return 0


if __name__ == "__main__":
    sys.exit(main())
