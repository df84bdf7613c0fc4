"""The live page in a real browser: 50 runs, a phone, names that are HTML, a token, a service that goes away."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sidecast.nowcaster_service.nowcasting import NowcastAnswer
from sidecast.nowcaster_service.page import answers
from sidecast.protos import nowcast_pb2 as pb
from sidecast.protos.transport import AUTHORIZATION_KEY
from tests.support.browsing.browser import Browser
from tests.support.services.harness import RunningService, open_request
from tests.support.services.page import commit_step, open_run, served_page

NUM_RUNS = 50
HOSTILE = """<img src=x onerror="document.title='owned'">'&quot;<script>alert(1)</script>"""
LONG = "a-name-without-a-place-to-break-it-" * 3
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
ROW = "[...document.querySelectorAll('.run')].find((row) => row.querySelector('.id').textContent === %s)"


@pytest.fixture
def browser(find_tool: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Browser]:
    monkeypatch.setattr(answers, "VIEW_AGE_S", 0.0)
    with Browser(find_tool("chromium"), tmp_path / "profile") as opened:
        yield opened
        assert opened.complaints == []


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as opened:
        yield opened


def row(run_id: str) -> str:
    return ROW % json.dumps(run_id)


def refreshed(browser: Browser, condition: str) -> None:
    """Lets the page ask again, sooner than it would, until something is to be seen."""
    browser.until(f"(setTimeout(ask), {condition})")


def text_of(browser: Browser, run_id: str, part: str) -> str:
    found: str = browser.evaluate(f"{row(run_id)}.querySelector('.{part}').innerText")
    return found


def test_fifty_runs_on_a_desk_and_on_a_phone(browser: Browser, stack: ExitStack, tmp_path: Path) -> None:
    service = stack.enter_context(RunningService(tmp_path, history_budget_bytes=1 << 30))
    page = stack.enter_context(served_page(service))
    names = ["hostile", LONG, *(f"run-{number}" for number in range(NUM_RUNS - 2))]
    for number, name in enumerate(names):
        predictor = HOSTILE if name == "hostile" else "fake"
        read_outs = ["ema5"] if number < 3 else []
        open_run(service, name, num_joined=1 if number == 5 else 2, read_outs=read_outs, predictor=predictor)
    service.engines.answer = NowcastAnswer(refusal=HOSTILE)
    for step in (10, 20):
        commit_step(service, step, "hostile")
    browser.open(address := f"http://127.0.0.1:{page.port}/")
    refreshed(browser, f"{row('hostile')}.querySelector('.state').innerText === 'no nowcast'")
    service.engines.answer = None
    for step in (10, 20):
        commit_step(service, step, LONG)
    report = pb.ReportRequest(session_id=LONG, version=1, outcome=pb.ReportRequest.ROLLED_BACK, epoch=1)
    refreshed(browser, f"{row(LONG)}.querySelector('.published').innerText.includes('1')")
    service.stub.Report(report)
    refreshed(browser, f"{row(LONG)}.querySelector('.state').innerText === 'undone'")
    assert browser.evaluate("document.querySelectorAll('.run').length") == NUM_RUNS
    assert text_of(browser, names[5], "state") == "joining"
    assert text_of(browser, names[5], "ranks") == "1 of 2"
    assert text_of(browser, LONG, "snapshot").startswith("step 20, ")
    assert browser.evaluate(OVERFLOW) <= 0

    # Whatever a text is made of, it is shown letter by letter, and nothing of it is carried out.
    browser.evaluate(f"{row('hostile')}.querySelector('details').open = true")
    browser.until(f"{row('hostile')}.querySelector('.more td')")
    for part in ("facts", "nowcasts"):
        assert HOSTILE in text_of(browser, "hostile", part)
    assert browser.evaluate("[document.title, document.querySelectorAll('img, .run script').length]") == ["sidecast", 0]

    # Folded out, it stays so, with what is selected in it, however often the page is brought up to date.
    browser.evaluate("window.before = document.querySelector('.more dd'); window.stamp = answeredMs")
    refreshed(browser, "answeredMs > stamp && document.querySelector('.more dd') === before")
    assert "ema5" in text_of(browser, "hostile", "read-outs")

    browser.evaluate("document.getElementById('filter').value = 'RUN-4'; showRuns()")
    browser.until("document.querySelectorAll('.run').length === 9")
    browser.evaluate(
        "document.getElementById('filter').value = ''; document.getElementById('order').value = 'attention'"
    )
    browser.evaluate("showRuns()")
    assert browser.evaluate("document.querySelector('.run .id').textContent") in ("hostile", LONG, names[5])

    # The address leads to the run that was folded out last.
    assert browser.evaluate("location.href") == f"{address}#hostile"
    browser.open(f"{address}#hostile", width=390, height=844)
    browser.until(f"{row('hostile')}.querySelector('.more td')")
    assert browser.evaluate("[innerWidth, document.querySelectorAll('details[open]').length]") == [390, 1]
    browser.evaluate(f"{row(LONG)}.querySelector('details').open = true")
    browser.until(f"{row(LONG)}.querySelector('.more td')")
    assert browser.evaluate(OVERFLOW) <= 0


def test_a_probe_is_drawn_where_there_is_one(browser: Browser, stack: ExitStack, tmp_path: Path) -> None:
    page = stack.enter_context(served_page(stack.enter_context(RunningService(tmp_path))))
    browser.open(f"http://127.0.0.1:{page.port}/")
    browser.until("document.getElementById('empty').hidden === false")
    points = [
        {"step": f"{step}", "losses": {"ema5": 4 - step / 100, "raw": 4.5 - step / 100}} for step in range(10, 110, 10)
    ]
    # One that was not finite is missing.
    points.insert(3, {"step": "35", "losses": {"raw": 4.2}})
    read_outs = [
        {"name": name, "step": "100", "begin_step": "0", "num_snapshots": "10"} for name in ("ema5", "mean@10")
    ]
    run = {"read_outs": read_outs, "probe": {"points": points, "best": "ema5", "fault": "it has <b>stopped</b>"}}
    browser.evaluate(f"document.querySelector('main').append(...readOuts({json.dumps(run)}))")
    drawn = browser.evaluate("document.querySelector('figure polyline.own').getAttribute('points')").split()
    heights = [float(point.split(",")[1]) for point in drawn]
    assert len(drawn) == 10
    assert heights == sorted(heights)
    assert len(browser.evaluate("document.querySelector('figure polyline.raw').getAttribute('points')").split()) == 11
    captions = browser.evaluate("[...document.querySelectorAll('figcaption')].map((item) => item.innerText)")
    assert "probe loss 3.000, 3.500 of the run's own weights (grey); the lowest" in captions[0]
    assert "probe" not in captions[1]
    assert "The probe: it has <b>stopped</b>" in browser.evaluate("document.querySelector('main').innerText")


def test_a_token_is_asked_for_and_kept_out_of_sight(browser: Browser, stack: ExitStack, tmp_path: Path) -> None:
    tenants = tmp_path / "tenants"
    tenants.write_text("".join(f"{name} {hashlib.sha256(name.encode()).hexdigest()}\n" for name in ("red", "blue")))
    service = stack.enter_context(RunningService(tmp_path, tenants_file=tenants))
    page = stack.enter_context(served_page(service))
    for name in ("red", "blue"):
        service.stub.Open(
            open_request(session_id=name, run_id=f"run-{name}"), metadata=((AUTHORIZATION_KEY, f"Bearer {name}"),)
        )
    browser.open(f"http://127.0.0.1:{page.port}/")
    browser.until("document.activeElement.id === 'token'")
    browser.enter("blue")
    browser.until("document.querySelectorAll('.run').length === 1")
    assert browser.evaluate(
        "document.querySelector('.id').textContent + document.querySelector('.tenant').innerText"
    ) == ("run-blueblue")
    assert browser.evaluate(
        "[location.href.includes('blue'), document.cookie, document.getElementById('token').value]"
    ) == [
        False,
        "",
        "",
    ]
    # Withdrawn while the page is open.
    tenants.write_text(f"red {hashlib.sha256(b'red').hexdigest()}\n")
    refreshed(browser, "!document.getElementById('sign-in').hidden")
    assert browser.evaluate("document.getElementById('refused').innerText") == "The service does not know this token."
    assert browser.evaluate("sessionStorage.length") == 0
    assert browser.evaluate("document.getElementById('live').hidden")
    browser.evaluate("document.getElementById('token').focus()")
    browser.enter("red")
    browser.until("document.querySelector('.id')?.textContent === 'run-red'")
    # The only complaints are the browser's own, about answers that ended the other's session.
    complaints = browser.complaints.copy()
    browser.complaints.clear()
    assert complaints
    assert all("401" in complaint for complaint in complaints)


def test_a_run_is_paused_and_resumed(browser: Browser, stack: ExitStack, tmp_path: Path) -> None:
    service = stack.enter_context(RunningService(tmp_path, page_control=True))
    page = stack.enter_context(served_page(service))
    open_run(service, "run", can_pause=True)
    open_run(service, "of-an-older-trainer")
    browser.open(f"http://127.0.0.1:{page.port}/", width=390, height=844)
    browser.until(f"{row('run')}.querySelector('details').open = true")
    for word, other, state in (("Pause", "Resume", "paused"), ("Resume", "Pause", "running")):
        button = f"{row('run')}.querySelector('button')"
        assert browser.evaluate(f"{button}.innerText") == word
        browser.evaluate(f"{button}.click()")
        browser.until(f"{button}.innerText === {json.dumps(other)} && !{button}.disabled")
        assert text_of(browser, "run", "state") == state
        (seen,) = [item for item in service.stub.Status(pb.StatusRequest()).sessions if item.run_id == "run"]
        assert seen.is_paused is (state == "paused")
    assert browser.evaluate(f"{row('of-an-older-trainer')}.querySelector('.control').hidden")
    assert browser.evaluate(OVERFLOW) <= 0


def test_a_service_that_goes_away_is_seen_to(browser: Browser, tmp_path: Path) -> None:
    with RunningService(tmp_path) as service, served_page(service) as page:
        open_run(service, "run")
        browser.open(f"http://127.0.0.1:{page.port}/")
        browser.until("document.getElementById('pulse').innerText === 'live'")
    browser.evaluate("answeredMs -= 60000; pulse()")
    assert browser.until("document.getElementById('pulse').innerText").startswith("no answer for 6")
    assert browser.evaluate("document.body.classList.contains('stale')")
    # What was known is still there to be read.
    assert browser.evaluate("document.querySelector('.id').textContent") == "run"
    # What the browser itself says of polls that found nobody.
    browser.complaints.clear()
