"""What the shared queries of dashboards come to on the real promtool, for a run that has moved: worked out by hand."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import yaml
from doctor import need

from outgrow.monitoring import metrics as m
from outgrow.monitoring.dashboards.queries import RUNS, STATES, goodput, newest, state, total, wall_share
from outgrow.monitoring.dashboards.written import concrete

MOVED = {
    # Started on n, lost there after 9 minutes; then on m. The agent of n still says what it knew.
    'outgrow_run_attempt_start_time_seconds{run="a",node="n"}': "0x30",
    'outgrow_run_attempt_start_time_seconds{run="a",node="m"}': "_x10 600x20",
    'outgrow_run_loss{run="a",node="n"}': "3x30",
    'outgrow_run_loss{run="a",node="m"}': "_x10 2x20",
    'outgrow_run_state{run="a",node="n",state="running"}': "1x9 0x20",
    'outgrow_run_state{run="a",node="n",state="lost"}': "0x9 1x20",
    'outgrow_run_state{run="a",node="m",state="running"}': "_x10 1x20",
    'outgrow_run_state{run="a",node="m",state="lost"}': "_x10 0x20",
    'outgrow_run_wall_seconds_total{run="a",node="n",kind="productive"}': "0+50x9 450x20",
    'outgrow_run_wall_seconds_total{run="a",node="n",kind="init"}': "0+10x9 90x20",
    'outgrow_run_wall_seconds_total{run="a",node="m",kind="productive"}': "_x10 450+30x20",
    'outgrow_run_wall_seconds_total{run="a",node="m",kind="init"}': "_x10 150+30x20",
    'outgrow_run_attempt_start_time_seconds{run="b",node="n"}': "0x30",
    'outgrow_run_loss{run="b",node="n"}': "7x30",
    'outgrow_run_state{run="b",node="n",state="running"}': "1x30",
}


@dataclass(frozen=True)
class Expected:
    expression: str
    at: str
    samples: dict[str, float]


def numbered(name: str) -> float:
    return 1.0 + list(STATES).index(name)


EXPECTED = (
    Expected(newest(m.RUN_LOSS, RUNS), "5m", {'{run="a"}': 3, '{run="b"}': 7}),
    Expected(newest(m.RUN_LOSS, RUNS), "20m", {'{run="a"}': 2, '{run="b"}': 7}),
    Expected(state(RUNS), "5m", {'{run="a"}': numbered("running"), '{run="b"}': numbered("running")}),
    Expected(state(RUNS), "20m", {'{run="a"}': numbered("running"), '{run="b"}': numbered("running")}),
    Expected(goodput(RUNS), "5m", {'{run="a"}': 250 / 300}),
    # Of 20 minutes: 450 + 300 s productive, 150 + 300 s init; nothing is counted twice.
    Expected(goodput(RUNS), "20m", {'{run="a"}': 750 / 1200}),
    Expected(total(m.RUN_WALL_SECONDS, RUNS), "20m", {'{run="a", kind="productive"}': 750, '{run="a", kind="init"}': 450}),
    Expected(wall_share(RUNS), "20m", {'{run="a", kind="productive"}': 0.5, '{run="a", kind="init"}': 0.5}),
)


def test_runs_that_move_are_told_once(tmp_path: Path) -> None:
    need("promtool")
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in MOVED.items()],
        "promql_expr_test": [
            {
                "expr": concrete(expected.expression, run="a|b", rate_s=300),
                "eval_time": expected.at,
                "exp_samples": [{"labels": labels, "value": value} for labels, value in expected.samples.items()],
            }
            for expected in EXPECTED
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": [test]}))
    done = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
