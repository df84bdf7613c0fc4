"""The pages hold together: links lead somewhere, decision records have one shape, generated parts are current."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PAGES = sorted([*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")])
RECORDS = sorted((DOCS / "adr").glob("[0-9]*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
# From the top of the tree: a folder, or a file with its ending.
TOPS = "sidecast|trainer|nowcaster_service|protos|tests|docs|deploy|benchmarks|examples|src"
NAMED_PATH = re.compile(rf"`((?:{TOPS})/(?:[\w./-]*/|[\w./-]*\.(?:py|md|toml|proto|yml|json|sh|svg)))`")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LEAD = re.compile(r"^\*\*(Decision|Why|Consequences)\b[^*]*\.\*\*", re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Files and anchors that a page points at; not the world outside."""
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            yield (page.parent / path).resolve() if path else page, anchor


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [
        f"{target}#{anchor}"
        for target, anchor in links(page)
        if not target.exists() or (anchor and anchor not in anchors(target))
    ]
    assert broken == []


def test_the_readme_leads_to_every_page() -> None:
    reached = {REPOSITORY / "README.md"}
    for page in PAGES:
        reached |= {target / "README.md" if target.is_dir() else target for target, _ in links(page)}
    assert [name_of(page) for page in PAGES if page not in reached] == []
    in_the_readme = {target for target, _ in links(REPOSITORY / "README.md")}
    assert [name_of(page) for page in DOCS.glob("*.md") if page not in in_the_readme] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page: Path) -> None:
    named = set(NAMED_PATH.findall(FENCE.sub("", page.read_text())))
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_the_glossary_explains_what_newcomers_ask() -> None:
    explained = set(re.findall(r"^\| \*\*([\w ]+)\*\* \|", (DOCS / "architecture.md").read_text(), re.MULTILINE))
    asked = "window interval period base epoch session part chunk shard fragment partition layout snapshot ballot jump"
    assert {*asked.split(), "probation"} <= explained


@pytest.mark.parametrize("record", RECORDS, ids=name_of)
def test_a_decision_record_has_the_shape_of_all(record: Path) -> None:
    text = record.read_text()
    number = int(record.name[:4])
    assert re.match(rf"# {number}\. \S", text), "the first line is `# NUMBER. TITLE`"
    assert [lead[1] for lead in LEAD.finditer(text)] == ["Decision", "Why", "Consequences"]
    assert text.split("\n\n")[1].startswith("**Decision.**")


def test_decision_records_are_numbered_without_doubles() -> None:
    numbers = [record.name[:4] for record in RECORDS]
    assert sorted(set(numbers)) == numbers


@pytest.mark.parametrize("script", sorted(DOCS.glob("generate_*.py")), ids=name_of)
def test_generated_parts_are_current(script: Path) -> None:
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("script", sorted(DOCS.glob("generate_*.py")), ids=name_of)
def test_the_makefile_runs_every_generator(script: Path) -> None:
    lines = (REPOSITORY / "Makefile").read_text().splitlines()
    command = f"\t$(BIN)/python docs/{script.name}"
    assert command in lines
    assert f"{command} --check" in lines
