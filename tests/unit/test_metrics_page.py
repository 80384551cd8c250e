"""The page of metrics is fresh, and says something of every metric and label; the declarations keep their own rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from outgrow.monitoring import metrics_page
from outgrow.monitoring.metrics import METRICS, Metric

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_is_fresh() -> None:
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_page.page(), "run: python -m outgrow.monitoring.metrics_page"


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_every_metric_stands_there_once(metric: Metric) -> None:
    rows = [line for line in metrics_page.page().splitlines() if line.startswith(f"| `{metric.name}` |")]
    assert len(rows) == 1 and metric.help in rows[0]
    assert rows[0].replace("\\|", "").count("|") == 5, "a bar within a cell would end it"


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_names_and_units(metric: Metric) -> None:
    assert re.fullmatch(r"outgrow_[a-z][a-z_]*[a-z]", metric.name)
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert not re.search(r"_(ms|us|millis\w*|micros\w*|kb|mb|gb|kib|mib|gib|percent|minutes|hours|mhz)(_|$)", metric.name)
    assert metric.help.endswith(".")
    assert len(set(metric.labels)) == len(metric.labels)


def test_each_label_is_explained() -> None:
    text = metrics_page.page().partition("## Labels")[2]
    explained = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    in_the_meaning = {
        "name",
        "engine",
        "device",
        "precision",
        "world",
        "version",
        "uuid",
        "ceiling",
        "result",
        "direction",
        "mode",
    }
    used = {label for metric in METRICS.values() for label in metric.labels}
    assert used <= explained | in_the_meaning
    assert explained <= used


def test_values_that_the_page_names_are_of_such_a_label() -> None:
    for label, name, values in metrics_page._VALUES:
        assert label in METRICS[name].labels
        assert values
