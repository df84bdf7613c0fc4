"""Writes the tables of settings.md from the settings' own documentation, or checks that they are current."""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "settings.md"
SERVE_BEGIN, SERVE_END = "<!-- generated: serve begin -->\n", "<!-- generated: serve end -->\n"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"
JSON_NAMES = {"None": "null", "True": "true", "False": "false", "field(default_factory=dict)": "{}", "()": "[]"}
HOOK, JOB = REPOSITORY / "trainer" / "hook", REPOSITORY / "trainer" / "job"
POLICIES = REPOSITORY / "sidecast" / "policies"
# What stands between the page's marks, in the page's order: the tables, each a class by its title.
PLACES = (
    (
        (HOOK / "config.py", "NowcasterConfig", "nowcaster"),
        (HOOK / "config.py", "HorizonConfig", "nowcaster.horizon"),
        (HOOK / "config.py", "TimeoutConfig", "nowcaster.timeouts"),
        (POLICIES / "push.py", "PushConfig", "nowcaster.push"),
    ),
    (
        (JOB / "config.py", "TrainingConfig", "training"),
        (JOB / "config.py", "CausalLMConfig", "training.model"),
        (JOB / "config.py", "DataConfig", "training.data"),
        (JOB / "schedules.py", "ScheduleConfig", "training.schedule"),
    ),
)


def written(page: str) -> str:
    """The page with all tables, in Markdown."""
    before, *rest = page.split(BEGIN)
    parts = [before]
    for place, text in zip(PLACES, rest, strict=True):
        tables = "\n".join(_table(source, name, title) for source, name, title in place)
        parts.append(f"{BEGIN}{tables}{END}{text.partition(END)[2]}")
    return "".join(parts)


def _table(source: Path, name: str, title: str) -> str:
    classes = (node for node in ast.parse(source.read_text()).body if isinstance(node, ast.ClassDef))
    (settings,) = (node for node in classes if node.name == name)
    lines = [f"### `{title}`", "", "| key | default | meaning |", "| --- | --- | --- |"]
    for setting, text in zip(settings.body, settings.body[1:], strict=False):
        if not (isinstance(setting, ast.AnnAssign) and setting.value is not None):
            continue
        assert isinstance(text, ast.Expr), f"{name}: a setting without a line of documentation: {ast.unparse(setting)}"
        default = ast.unparse(setting.value)
        shown = JSON_NAMES.get(default, default).replace("'", '"')
        shown = "below" if shown.startswith("field(") else f"`{shown}`"
        assert isinstance(setting.target, ast.Name)
        meaning = ast.literal_eval(text.value).replace("``", "`").replace("|", "\\|").replace("None:", "null:")
        lines.append(f"| `{setting.target.id}` | {shown} | {' '.join(meaning.split())} |")
    return "\n".join(lines) + "\n"


def with_serve_options(page: str) -> str:
    """The page with the table of `sidecast serve`'s options, from the declarations that the command reads itself."""
    from sidecast.nowcaster_service.commands.serve import OPTIONS

    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for option in OPTIONS:
        lines.append(f"| `{option.flag}` | {option.default or 'none'} | {option.help} |")
    before, _, rest = page.partition(SERVE_BEGIN)
    after = rest.partition(SERVE_END)[2]
    return "\n".join([before + SERVE_BEGIN.rstrip("\n"), *lines, SERVE_END + after])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if the page is stale")
    is_check = parser.parse_args().check
    page = PAGE.read_text()
    current = with_serve_options(written(page))
    if is_check and current != page:
        sys.stderr.write("docs/settings.md is stale; run `make docs`\n")
        return 1
    PAGE.write_text(current)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
