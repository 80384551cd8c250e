"""Alerts, by the real promtool: each fires and stays silent where it should, and a wrong unit or label in it would be seen."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from alert_cases import CASES, Case
from doctor import need
from promql import names, times, wrong_labels, wrong_units

from outgrow.cli import app
from outgrow.monitoring import metrics
from outgrow.monitoring.alerts.build import files, rule_file
from outgrow.monitoring.alerts.rules import ALERTS, Alert
from outgrow.monitoring.dashboards.written import dashboards

BY_NAME = {alert.name: alert for alert in ALERTS}


def of_alert(alert: Alert) -> list[Case]:
    return [case for case in CASES if case.alert == alert.name]


def test_each_has_a_case_that_fires_and_one_that_does_not() -> None:
    assert {case.alert for case in CASES} == set(BY_NAME)
    for alert in ALERTS:
        assert {bool(case.fires) for case in of_alert(alert)} == {True, False}, alert.name


def test_what_is_generated_is_fresh() -> None:
    for path, text in files().items():
        assert path.read_text() == text, f"{path} is stale: python -m outgrow.monitoring.alerts.build"


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_only_declared_metrics_and_labels_are_named(alert: Alert) -> None:
    declared = {name: metric.labels for metric in metrics.METRICS.values() for name in metrics.series_names(metric)}
    found = names(alert.expr)
    known = set[str]()
    for name, matched in found.selectors:
        assert name in declared
        assert set(matched) <= set(declared[name])
        known |= set(declared[name])
    assert found.grouped <= known
    assert set(alert.labels) <= known


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_texts_name_labels_that_the_alert_has(alert: Alert) -> None:
    for case in of_alert(alert):
        assert all(set(labels) == set(alert.labels) for labels in case.labels)
    assert set(re.findall(r"\$labels\.(\w+)", alert.summary + alert.description)) <= set(alert.labels)
    assert "{{" not in alert.runbook
    assert f"{alert.dashboard}.json" in dashboards()
    for name in re.findall(r"\(#(\w+)\)", alert.runbook):
        assert name in {other.anchor for other in ALERTS}


def test_the_rule_file_is_well_formed() -> None:
    need("promtool")
    rules = next(path for path in files() if path.suffix == ".yml")
    done = subprocess.run(["promtool", "check", "rules", rules], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_each_fires_where_it_should(tmp_path: Path) -> None:
    need("promtool")
    failed, output = failing(tmp_path, {alert.name: alert for alert in ALERTS})
    assert not failed, output


def mutants(alert: Alert) -> dict[str, Alert]:
    """The alert with one mistake each, by what that is."""
    found = {f"unit: {expr}": replace(alert, expr=expr) for expr in wrong_units(alert.expr)}
    found |= {f"label: {expr}": replace(alert, expr=expr) for expr in wrong_labels(alert.expr)}
    if alert.for_ != "0s":
        found |= {f"for: {span}": replace(alert, for_=span) for span in (times(alert.for_, 1000), times(alert.for_, 0.001))}
    return found


def test_a_wrong_unit_or_label_is_seen(tmp_path: Path) -> None:
    need("promtool")
    wrong = {f"{alert.name} {what}": mutant for alert in ALERTS for what, mutant in mutants(alert).items()}
    for alert in ALERTS:
        mine = [name for name in wrong if name.startswith(f"{alert.name} ")]
        assert any(" unit: " in name for name in mine), alert.name
        assert any(" label: " in name for name in mine), alert.name
    assert len(wrong) > 180
    seen, _ = failing(tmp_path, wrong)
    assert not set(wrong) - seen


def failing(folder: Path, variants: dict[str, Alert]) -> tuple[set[str], str]:
    """The names of those that some case of their alert finds wrong, and what promtool says.

    Variants of one alert stand in one file, each under a name of its own, so that a case's database is made once for all.
    Where the expression of one cannot be evaluated, promtool ends the case there: the others are asked again without it.
    """
    left, failed, told = dict(variants), set[str](), ""
    while left:
        tests = written(folder, left)
        with ThreadPoolExecutor(2) as pool:
            # Two at once, as many as this project's machines have cores.
            output = "\n".join(pool.map(promtool, [tests[part::2] for part in range(2)]))
        told += output
        assert output.count("Unit Testing:") == len(tests)
        numbered = dict(enumerate(left))
        failed |= {numbered[int(number)] for number in re.findall(r"alertname: Outgrow[A-Za-z]+_(\d+), time:", output)}
        broken = {numbered[int(number)] for number in re.findall(r"rule: Outgrow[A-Za-z]+_(\d+), time:", output)}
        failed |= broken
        left = {name: alert for name, alert in left.items() if broken and name not in failed}
    return failed, told


def written(folder: Path, variants: dict[str, Alert]) -> list[str]:
    """A file of tests for each alert that has variants."""
    by_name = defaultdict[str, dict[str, Alert]](dict)
    for number, alert in enumerate(variants.values()):
        by_name[alert.name][f"{alert.name}_{number}"] = alert
    paths = []
    for name, own in by_name.items():
        rules, tests = folder / f"{name}.rules.yml", folder / f"{name}.test.yml"
        rules.write_text(json.dumps(without_words([replace(alert, name=as_) for as_, alert in own.items()])))
        tests.write_text(json.dumps(promtool_file(rules, list(own), of_alert(BY_NAME[name]))))
        paths.append(str(tests))
    return paths


def promtool(tests: Sequence[str]) -> str:
    if not tests:
        return ""
    # Each case has a database of its own, which is fsynced: in memory that costs nothing.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as scratch:
        environment = {**os.environ, "TMPDIR": scratch, "GOGC": "400", "GOMAXPROCS": "1"}
        command = ["promtool", "test", "rules", *tests]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=250)
    return done.stdout + done.stderr


def without_words(alerts: Sequence[Alert]) -> dict[str, object]:
    """The rule file without what promtool would compare word by word."""
    data = rule_file(alerts)
    for rule in data["groups"][0]["rules"]:
        del rule["annotations"]
    return data


def promtool_file(rules: Path, rule_names: Sequence[str], cases: Sequence[Case]) -> dict[str, object]:
    """Every one of ``rule_names``, variants of one alert, in all its ``cases``."""
    at = defaultdict[tuple[tuple[str, str], ...], list[Case]](list)
    for case in cases:
        at[tuple(case.series.items())].append(case)
    return {
        "rule_files": [rules.name],
        # What need not last may be looked at seldom; all cases are at whole minutes, or ten.
        "evaluation_interval": "10m" if BY_NAME[cases[0].alert].for_ == "0s" else "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series],
                "alert_rule_test": [expectation(case, name) for case in same for name in rule_names],
            }
            for series, same in at.items()
        ],
    }


def expectation(case: Case, name: str) -> dict[str, object]:
    severity = {"severity": BY_NAME[case.alert].severity}
    expected = [{"exp_labels": labels | severity} for labels in case.labels]
    return {"eval_time": case.at, "alertname": name, "exp_alerts": expected}


def test_what_a_runbook_says_to_type_exists() -> None:
    root = typer.main.get_command(app)
    said = [words.split() for alert in ALERTS for words in re.findall(r"`outgrow ([^`]+)`", alert.runbook)]
    assert len(said) > 5
    for words in said:
        command = root
        for word in words:
            if word.isupper() or word.startswith("-"):
                break
            commands = getattr(command, "commands", {})
            assert word in commands, words
            command = commands[word]
