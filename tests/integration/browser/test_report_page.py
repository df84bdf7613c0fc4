"""The page of ``sidecast report`` in a real browser, opened as the file that one would send."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sidecast.commands.__main__ import main
from tests.support.browsing.browser import Browser
from tests.support.browsing.recorded_runs import write_recorded_run

LONG = "a-name-without-a-place-to-break-it-" * 4


def test_a_report_is_whole_and_fits_a_phone(find_tool: Callable[[str], str], tmp_path: Path) -> None:
    chromium = find_tool("chromium")
    runs = [
        write_recorded_run(tmp_path / "plain"),
        write_recorded_run(tmp_path / LONG, gain=0.3, nowcaster={"policy": "push", "push": {"interval_steps": 20}}),
        write_recorded_run(tmp_path / "cosine", schedule="cosine", changes={"deepspeed.optimizer.params.lr": 0.003}),
    ]
    out = tmp_path / "report.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    with Browser(chromium, tmp_path / "profile") as browser:
        for width in (1280, 390):
            browser.open(out.as_uri(), width=width)
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert browser.evaluate(overflow) <= 0
            # Every chart has room, and every run a line in it.
            assert browser.evaluate(
                "[...document.querySelectorAll('svg')].map((image) => image.clientWidth > 250)"
            ) == ([True] * 3)
            assert browser.evaluate("document.querySelectorAll('svg polyline').length") == 3 * 2 * len(runs)
        colours = (
            "new Set([...document.querySelectorAll('.legend i')].map((item) => getComputedStyle(item).borderTopColor))"
        )
        assert browser.evaluate(f"({colours}).size") == len(runs)
        assert browser.complaints == []
