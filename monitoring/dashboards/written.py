"""The generated dashboards as they lie in the package: for Grafana's provisioning, and every expression in them.

Needs nothing of the library that made them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("json")

_VARIABLE_QUERY = re.compile(r"(?:label_values\((?P<selector>.+), \w+\)|query_result\((?P<expression>.+)\))")


def dashboards() -> dict[str, dict[str, Any]]:
    """Every dashboard, by the name of its file."""
    return {path.name: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}


def for_site(ray_dashboard: str) -> dict[str, str]:
    """What is to be provisioned: the text of every dashboard by its file's name, with the link to this site's Ray dashboard."""
    found = {}
    for name, dashboard in dashboards().items():
        for variable in dashboard["templating"]["list"]:
            if variable["name"] == "ray_dashboard":
                variable["query"] = ray_dashboard
        found[name] = json.dumps(dashboard, indent=1) + "\n"
    return found


def expressions() -> list[tuple[str, str]]:
    """Every expression of every panel, annotation and variable, with where it stands; Grafana's variables are still in it."""
    return [found for dashboard in dashboards().values() for found in _of(dashboard)]


def concrete(expression: str, *, run: str, node: str = ".+", range_s: int = 3600, rate_s: int = 60) -> str:
    """The expression as Grafana would send it: for runs and nodes (patterns where the dashboard takes several), ``range_s``
    seconds shown, and rates over ``rate_s`` seconds."""
    values = {"__range": f"{range_s}s", "__rate_interval": f"{rate_s}s", "run": run, "node": node}
    return re.sub(r"\$(\w+)", lambda found: values[found[1]], expression)


def _of(dashboard: dict[str, Any]) -> Iterator[tuple[str, str]]:
    title = dashboard["title"]
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield f"{title}: {panel['title']} {target['refId']}", target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        yield f"{title}: annotation {annotation['name']}", annotation["expr"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = _VARIABLE_QUERY.fullmatch(variable["query"]["query"])
            assert found, variable
            yield f"{title}: variable {variable['name']}", found["selector"] or found["expression"]
