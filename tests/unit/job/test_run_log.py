from __future__ import annotations

from pathlib import Path

from sidecast.trainer.job.run_log import METRICS_NAME, RunLog, read_records


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_records(path)]


def write(run_dir: Path, first: int, last: int, resume_step: int | None = None) -> None:
    with RunLog(run_dir, resume_step) as log:
        for step in range(first, last + 1):
            log({"kind": "train", "step": step})


def test_a_new_run_starts_the_file_anew(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    write(tmp_path, 1, 2)
    assert steps(tmp_path / METRICS_NAME) == [1, 2]


def test_a_resumed_run_forgets_what_it_will_repeat(tmp_path: Path) -> None:
    write(tmp_path, 1, 5)
    write(tmp_path, 4, 6, resume_step=3)
    assert steps(tmp_path / METRICS_NAME) == [1, 2, 3, 4, 5, 6]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    path = tmp_path / METRICS_NAME
    path.write_text(path.read_text() + '{"kind": "tr')
    assert steps(path) == [1, 2]
