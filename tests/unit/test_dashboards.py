"""Dashboards: fresh, made of declared metrics alone, and each panel says what it shows and what to do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from doctor import need
from promql import names

from outgrow.monitoring import metrics
from outgrow.monitoring.alerts.rules import ALERTS
from outgrow.monitoring.dashboards.build import files
from outgrow.monitoring.dashboards.queries import PHASE, WALL
from outgrow.monitoring.dashboards.written import FOLDER, concrete, dashboards, expressions, for_site
from outgrow.monitoring.recording.slots import PHASES
from outgrow.monitoring.recording.slots import WALL as KINDS
from outgrow.recipes.schema.site import Cluster

DECLARED = {name: metric.labels for metric in metrics.METRICS.values() for name in metrics.series_names(metric)}
OF_PROMETHEUS = {"ALERTS": ("alertname", "alertstate", "run")}
VARIABLES = {"__range", "__rate_interval", "run", "node"}
ALL = dashboards()


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_what_is_generated_is_fresh() -> None:
    made = files()
    assert {path.name for path in FOLDER.iterdir()} == set(made)
    for name, text in made.items():
        assert (FOLDER / name).read_text() == text, f"{name} is stale: python -m outgrow.monitoring.dashboards.build"


def test_reading_them_needs_nothing_of_the_library() -> None:
    text = (FOLDER.parent / "written.py").read_text()
    assert "grafana_foundation_sdk" not in text


@pytest.mark.parametrize(("where", "expression"), expressions(), ids=lambda text: text if ": " in text else "")
def test_only_declared_metrics_and_labels_are_named(where: str, expression: str) -> None:
    assert set(re.findall(r"\$(\w+)", expression)) <= VARIABLES
    declared = DECLARED | OF_PROMETHEUS
    found = names(concrete(expression, run="r"))
    known = {"le"} if any(name.endswith("_bucket") for name, _ in found.selectors) else set[str]()
    assert found.selectors
    for name, matched in found.selectors:
        assert set(matched) <= set(declared[name]), where
        known |= set(declared[name])
    assert found.grouped <= known


def test_prometheus_takes_every_expression(tmp_path: Path) -> None:
    need("promtool")
    rules = [
        {"record": f"expression:number{number}", "expr": concrete(expression, run="r")}
        for number, (_, expression) in enumerate(expressions())
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "expressions", "rules": rules}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", tmp_path / "rules.yml"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_every_metric_is_shown_or_alerted_on() -> None:
    said = [concrete(expression, run="r") for _, expression in expressions()] + [alert.expr for alert in ALERTS]
    used = {name for expression in said for name, _ in names(expression).selectors}
    for metric in metrics.METRICS.values():
        assert used & set(metrics.series_names(metric)), f"{metric.name} is shown nowhere"


@pytest.mark.parametrize("name", ALL)
def test_a_panel_says_what_it_shows(name: str) -> None:
    titles = set[str]()
    for panel in panels(ALL[name]):
        where = f"{name}: {panel['title']}"
        assert panel["title"] not in titles, where
        titles.add(panel["title"])
        assert len(panel["description"]) > 10, where
        assert panel["description"].endswith("."), where
        assert panel["datasource"]["uid"] == "${datasource}", where
        defaults = panel["fieldConfig"]["defaults"]
        # Those that show words, labels or a column each with its own unit, or whose axis has it.
        if panel["type"] not in ("table", "state-timeline", "heatmap"):
            assert defaults["unit"], where
        for target in panel["targets"]:
            assert target["legendFormat"], where
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels_of(target["expr"]), where
        if panel["type"] in ("timeseries", "state-timeline"):
            assert panel["options"]["legend"]["showLegend"], where


def labels_of(expression: str) -> set[str]:
    found = names(concrete(expression, run="r"))
    return {label for name, _ in found.selectors for label in (DECLARED | OF_PROMETHEUS)[name]} | found.grouped


@pytest.mark.parametrize("name", ALL)
def test_panels_fill_rows_and_lie_beside_each_other(name: str) -> None:
    taken = set[tuple[int, int]]()
    for panel in ALL[name]["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    for row in {y for _, y in taken}:
        assert {x for x, y in taken if y == row} == set(range(24)), f"{name}: a gap at {row}"
    identities = [panel["id"] for panel in ALL[name]["panels"]]
    assert identities == list(range(1, len(identities) + 1))


def test_dashboards_know_each_other_and_rays() -> None:
    assert [dashboard["uid"] for dashboard in ALL.values()] == [name.removesuffix(".json") for name in ALL]
    assert len(ALL) == 5
    for dashboard in ALL.values():
        others, ray = dashboard["links"]
        assert others["type"] == "dashboards"
        assert others["tags"] == dashboard["tags"] == ["outgrow"]
        assert others["keepTime"]
        assert others["includeVars"]
        assert ray["url"] == "${ray_dashboard}"
        variables = {variable["name"] for variable in dashboard["templating"]["list"]}
        used = {name for _, text in expressions() for name in re.findall(r"\$(run|node)", text)} & set(
            re.findall(r"\$(run|node)", str(dashboard["panels"]))
        )
        assert {"datasource", "ray_dashboard"} | used == variables


def test_what_happened_is_marked() -> None:
    for name, dashboard in ALL.items():
        marks = [mark["name"] for mark in dashboard["annotations"]["list"]]
        of_runs = ["Restarts", "Checkpoints", "Spikes of the loss"] if name != "outgrow-gpus.json" else []
        assert marks == [*of_runs, "Alerts"]


def test_the_link_to_ray_is_the_sites() -> None:
    assert {variable["query"] for variable in ray_variables(ALL)} == {Cluster().dashboard}
    changed = for_site("http://head:8265")
    parsed = {name: yaml.safe_load(text) for name, text in changed.items()}
    assert {variable["query"] for variable in ray_variables(parsed)} == {"http://head:8265"}
    assert set(changed) == set(ALL)


def ray_variables(all_dashboards: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    lists = [dashboard["templating"]["list"] for dashboard in all_dashboards.values()]
    return [variable for variables in lists for variable in variables if variable["name"] == "ray_dashboard"]


def test_every_kind_of_time_has_its_colour() -> None:
    assert tuple(PHASE) == PHASES
    assert tuple(WALL) == KINDS
