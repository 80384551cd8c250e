"""The rule file of Prometheus and docs/alerts.md, made of ``rules``.

``python -m outgrow.monitoring.alerts.build`` rewrites them; a test fails when they are stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from outgrow.monitoring.alerts.rules import ALERTS, Alert

RULES = Path(__file__).with_name("outgrow.rules.yml")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "alerts.md"

_MADE = "made by python -m outgrow.monitoring.alerts.build; change monitoring/alerts/rules.py instead"
_INTRODUCTION = """\
`outgrow monitor up` gives these rules to Prometheus. They are told in Alertmanager and as marks on the dashboards, and go to
`monitoring.alert_webhook` of the site where that is set. *critical* means that a run stands still or is about to lose work;
*warning* that it is slower or less safe than it could be. `for` is how long it must have been so."""


def rule_file(alerts: Iterable[Alert] = ALERTS) -> dict[str, Any]:
    """What Prometheus reads, as plain data."""
    return {"groups": [{"name": "outgrow", "rules": [_rule(alert) for alert in alerts]}]}


def files() -> dict[Path, str]:
    """The text of every generated file."""
    return {RULES: f"# {_MADE}\n{_yaml(rule_file())}", PAGE: page()}


def page() -> str:
    """A Markdown page with what to do about each alert."""
    return "\n".join([f"<!-- {_MADE} -->", "", "# Alerts", "", _INTRODUCTION, "", *_table(), "", *_sections()]).rstrip() + "\n"


def _rule(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.for_,
        "labels": {"severity": alert.severity},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook": f"docs/alerts.md#{alert.anchor}",
            "dashboard": alert.dashboard,
        },
    }


def _yaml(data: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(data, sort_keys=False, width=120, allow_unicode=True)
    return text


def _table() -> Iterator[str]:
    yield "| alert | severity | for | of each |"
    yield "|---|---|---|---|"
    for alert in ALERTS:
        yield f"| [{alert.name}](#{alert.anchor}) | {alert.severity} | {alert.for_} | {', '.join(alert.labels)} |"


def _sections() -> Iterator[str]:
    for alert in ALERTS:
        yield from (f"## {alert.name}", "", _without_templates(alert.description), "", alert.runbook, "")
        yield from ("```promql", alert.expr, "```", "")


def _without_templates(text: str) -> str:
    """The description for any run: names stand for values."""
    for label in ("run", "node", "rank", "gpu", "tier", "reason", "xid"):
        text = text.replace(f"{{{{ $labels.{label} }}}}", f"*{label}*")
    for filter_ in ("humanizePercentage", "humanizeDuration", "humanize1024"):
        text = text.replace(f"{{{{ $value | {filter_} }}}}", "*value*" if filter_ != "humanize1024" else "*value* ")
    return text


def main() -> None:
    for path, text in files().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
