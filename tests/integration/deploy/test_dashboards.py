"""Every panel of the shipped dashboards, against a real Prometheus that has recorded an hour of a run."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.monitoring.prometheus import evaluated_rules, query_rows, start_prometheus, started_processes
from tests.support.monitoring.recorded_run import RecordedRun

REPOSITORY = Path(__file__).resolve().parents[3]
DEPLOY = REPOSITORY / "deploy"
GRAFANA = DEPLOY / "grafana"
RULES = ("recording_rules.yml", "alerts.yml")
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))
LEGEND_LABEL = re.compile(r"{{(\w+)}}")


def dashboard(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


def targets(path: Path) -> Iterator[tuple[str, str, str]]:
    """Title, expression for all runs, and legend."""
    for panel in dashboard(path)["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"].replace("$run", ".*"), target["legendFormat"]


def test_every_panel_shows_something_of_a_recorded_run(find_tool: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "recorded.txt").write_text(RecordedRun().open_metrics(end_s=time.time()))
    load = ["tsdb", "create-blocks-from", "openmetrics", tmp_path / "recorded.txt", tmp_path / "data"]
    done = subprocess.run([find_tool("promtool"), *load], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in RULES:
        shutil.copy(DEPLOY / name, tmp_path)
    # The rules as they are shipped, and nothing to scrape. A block that was loaded ends later than now, by its name.
    configuration = {
        "global": {"evaluation_interval": "1s"},
        "rule_files": yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["rule_files"],
        "storage": {"tsdb": {"out_of_order_time_window": "1d"}},
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(configuration))
    with started_processes(tmp_path) as start:
        url = start_prometheus(start, find_tool("prometheus"), tmp_path / "prometheus.yml", tmp_path / "data")
        rules = evaluated_rules(url)
        answers = {
            (path.name, title, expression): (legend, query_rows(url, expression))
            for path in DASHBOARDS
            for title, expression, legend in targets(path)
        }
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
    # It is a healthy run, with one of each mishap.
    assert [rule["name"] for rule in rules if rule.get("alerts")] == []
    assert [key for key, (_, rows) in answers.items() if not rows] == []
    for key, (legend, rows) in answers.items():
        for row in rows:
            assert math.isfinite(float(row["value"][1])), (key, row)
            assert set(LEGEND_LABEL.findall(legend)) <= set(row["metric"]), (key, row)
        names = [LEGEND_LABEL.sub(lambda label, row=row: row["metric"][label[1]], legend) for row in rows]
        assert len(set(names)) == len(names), f"{key} draws several lines of one name: {names}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_panels_ask_the_chosen_source_and_do_not_overlap(path: Path) -> None:
    panels = dashboard(path)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["datasource"]["uid"] for panel in panels if panel["type"] != "text"} == {"${source}"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        box = panel["gridPos"]
        assert box["x"] + box["w"] <= 24
        cells = {(box["x"] + x, box["y"] + y) for x in range(box["w"]) for y in range(box["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_grafana_finds_the_source_and_the_dashboards() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/sidecast.yml").read_text())["providers"]
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    assert mounts == {
        "./deploy/grafana/provisioning": "/etc/grafana/provisioning",
        "./deploy/grafana/dashboards": provider["options"]["path"],
    }
    host, _, port = source["url"].removeprefix("http://").partition(":")
    assert compose[host]["ports"] == [f"127.0.0.1:{port}:{port}"]
    for path in DASHBOARDS:
        (chosen,) = (item for item in dashboard(path)["templating"]["list"] if item["type"] == "datasource")
        assert chosen["current"]["value"] == source["uid"]
    assert len({dashboard(path)["uid"] for path in DASHBOARDS}) == len(DASHBOARDS) == 2


def test_nobody_can_change_grafana_and_only_this_host_sees_it() -> None:
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]["grafana"]
    assert all(port.startswith("127.0.0.1:") for port in compose["ports"])
    assert re.fullmatch(r"grafana/grafana:\d+\.\d+\.\d+", compose["image"])
    settings = compose["environment"]
    assert settings["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    # There is no account, and no way to sign in as one.
    assert settings["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert settings["GF_AUTH_BASIC_ENABLED"] == "false"
    assert settings["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"


def test_every_alert_has_a_runbook_of_the_same_shape_and_every_runbook_an_alert() -> None:
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    alerts = {rule["alert"]: rule["annotations"] for group in groups for rule in group["rules"]}
    assert all(annotations["runbook_url"] == f"docs/runbooks/{name}.md" for name, annotations in alerts.items())
    pages = {path.stem: path.read_text() for path in (REPOSITORY / "docs/runbooks").glob("Sidecast*.md")}
    assert set(pages) == set(alerts)
    for name, page in pages.items():
        assert page.startswith(f"# {name}\n")
        assert re.findall(r"^## (.*)$", page, re.MULTILINE) == ["What it costs", "See the cause", "What to do"], name
