"""Every comparison of the end-to-end tests that needs a service which stays, in one process group."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.integration.workers.push_runs import compare_pushes
from tests.integration.workers.resume_runs import compare_with_a_resume
from tests.integration.workers.snapshot_runs import compare_snapshots
from tests.integration.workers.tiny_job import start_process_group


def main(address: str, folder: Path) -> None:
    rank = start_process_group()
    compare_snapshots(rank, address, folder)
    compare_with_a_resume(rank, address, folder)
    compare_pushes(rank, address, folder)


if __name__ == "__main__":
    main(sys.argv[-2], Path(sys.argv[-1]))
