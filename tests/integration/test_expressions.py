"""Every expression of dashboards and alerts on a real Prometheus that has a sample of every declared metric."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from doctor import need
from series_of_all import NODE, RUN, openmetrics
from tiny_runs import free_ports, wait_for

from outgrow.monitoring.alerts.build import rule_file
from outgrow.monitoring.dashboards.written import concrete, expressions

NOW = int(time.time())


class Server:
    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: Any) -> Any:
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def is_ready(self) -> bool:
        try:
            return requests.get(f"{self.url}/-/ready", timeout=5).ok
        except requests.ConnectionError:
            return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    need("prometheus", "promtool")
    folder: Path = tmp_path_factory.mktemp("prometheus")
    (folder / "series.txt").write_text(openmetrics(NOW))
    blocks = ["promtool", "tsdb", "create-blocks-from", "openmetrics", folder / "series.txt", folder / "data"]
    subprocess.run(blocks, check=True, capture_output=True, timeout=60)
    rules = rule_file()
    for rule in rules["groups"][0]["rules"]:
        del rule["for"]
    (folder / "rules.yml").write_text(yaml.safe_dump(rules))
    config = {"global": {"evaluation_interval": "1s"}, "rule_files": [str(folder / "rules.yml")]}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    (port,) = free_ports(1)
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
    try:
        found = Server(f"http://127.0.0.1:{port}")
        wait_for(found.is_ready, "answer", (folder / "log").read_text, timeout_s=20)
        yield found
    finally:
        process.terminate()
        process.wait(20)


def test_every_expression_of_every_dashboard_has_an_answer(server: Server) -> None:
    empty = []
    for where, expression in expressions():
        query = concrete(expression, run=RUN, node=NODE, range_s=1800, rate_s=60)
        found = server.get("query_range", query=query, start=NOW - 900, end=NOW, step=60)["result"]
        values = [float(value) for series in found for _, value in series["values"]]
        if not any(map(math.isfinite, values)):
            empty.append(f"{where}: {query}")
    assert not empty


def test_alerts_that_fire_say_it_in_words(server: Server) -> None:
    """What fires on these series, where every counter grows and every throttle is on."""
    wait_for(lambda: len(server.get("alerts")["alerts"]) > 8, "nine alerts", lambda: str(server.get("alerts")), timeout_s=90)
    for alert in server.get("alerts")["alerts"]:
        assert alert["state"] == "firing"
        for text in alert["annotations"].values():
            assert text
            assert not any(mark in text for mark in ("{{", "<no value>", "<error", "%!")), text
    names = {alert["labels"]["alertname"] for alert in server.get("alerts")["alerts"]}
    assert {"OutgrowNonFinite", "OutgrowDiskFull", "OutgrowCheckpointFailing", "OutgrowThrottled", "OutgrowXidError"} <= names
