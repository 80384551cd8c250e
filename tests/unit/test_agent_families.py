"""The answer to a scrape: names and kinds as declared, broken sources counted, and what promtool says of the real output."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from agent_runs import attempt_facts
from doctor import need
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse
from recorded_ranks import make_step, recorder, site_at, started

from outgrow.contracts import ShardCounts, TierTraffic
from outgrow.monitoring import metrics
from outgrow.monitoring.agent.families import Collector, families
from outgrow.monitoring.agent.host import HostSource
from outgrow.monitoring.agent.nvml import NvmlSource, RecordedReader
from outgrow.monitoring.agent.rank_source import RankSource
from outgrow.monitoring.agent.run_source import RunSource, mfu
from outgrow.monitoring.agent.samples import Sample, Source
from outgrow.monitoring.agent.scan import RunView, Scanner
from outgrow.monitoring.agent.shards import ShardsSource
from outgrow.monitoring.recording.attempt import attempt_folder, node_folder, records_folder

FILES = Path(__file__).parents[1] / "files"
STEP_S = 0.3


class Given:
    """A source of given samples, that then breaks."""

    def __init__(self, part: str, samples: Sequence[Sample], error: Exception | None = None) -> None:
        self.part, self._samples, self._error = part, samples, error

    def samples(self, runs: Sequence[RunView]) -> Iterator[Sample]:
        yield from self._samples
        if self._error is not None:
            raise self._error


def values(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value for family in parse(text) for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float | None:
    """Of the one sample with these labels among its own."""
    found = [given for (called, own), given in values(text).items() if called == name and set(labels.items()) <= own]
    assert len(found) <= 1, f"{name}{labels}: {len(found)} samples"
    return found[0] if found else None


def test_a_counter_has_no_created_series_and_nan_is_no_value() -> None:
    text = generate_latest(
        Collector(  # type: ignore[arg-type]
            "n",
            list,
            [
                Given(
                    "a",
                    [
                        Sample(metrics.RUN_STEPS, ("r", "n"), 7),
                        Sample(metrics.RUN_LOSS, ("r", "n"), math.nan),
                        Sample(metrics.RUN_LOSS, ("r2", "n"), 2.5),
                    ],
                )
            ],
        )
    ).decode()
    assert 'outgrow_run_steps_total{node="n",run="r"} 7.0' in text
    assert "_created" not in text
    assert value(text, "outgrow_run_loss", run="r") is None
    assert value(text, "outgrow_run_loss", run="r2") == 2.5


def test_a_source_that_breaks_is_counted_and_the_others_are_served(caplog: pytest.LogCaptureFixture) -> None:
    sources: list[Source] = [
        Given("broken", [Sample(metrics.RUN_STEP, ("r", "n"), 1)], RuntimeError("the driver is gone")),
        Given("well", [Sample(metrics.RUN_EPOCH, ("r", "n"), 2)]),
    ]
    collector = Collector("n", list, sources)
    for _ in range(3):
        text = generate_latest(collector).decode()  # type: ignore[arg-type]
    assert value(text, "outgrow_agent_errors_total", part="broken") == 3
    assert value(text, "outgrow_agent_errors_total", part="well") == 0
    assert value(text, "outgrow_run_step") == 1  # what it gave before it broke
    assert value(text, "outgrow_run_epoch") == 2
    assert len([record for record in caplog.records if "broken" in record.getMessage()]) == 1


def test_two_samples_of_one_series_are_one_and_odd_labels_spoil_nothing() -> None:
    given = [Sample(metrics.RUN_STEP, ("r", "n"), 1), Sample(metrics.RUN_STEP, ("r", "n"), 2)]
    given.append(Sample(metrics.RUN_STEP, ("bad\udcff", 'quote"\n\\'), 3))
    [family] = families(given)
    assert [sample.value for sample in family.samples] == [2, 3]
    assert "bad?" in generate_latest(Collector("n", list, [Given("a", given)])).decode()  # type: ignore[arg-type]


def test_mfu_of_ranks_on_other_nodes() -> None:
    facts = attempt_facts(world=4, vendor_flops=1000.0)
    assert mfu(facts, 1000.0, []) == {"vendor": 0.25}
    assert mfu(facts, 1000.0, [500.0, 300.0]) == {"vendor": 0.25, "measured": 1000.0 / (4 * 400.0)}
    assert mfu(facts, 1000.0, [500.0] * 4)["measured"] == 0.5


# --- a whole node -----------------------------------------------------------------------------------------------------


def whole_node(folder: Path, num_ranks: int) -> Collector:
    """A run with every source that there is."""
    site = site_at(folder, 9640)
    node = node_folder(site)
    counts = folder / "counts.json"
    traffic = TierTraffic(shards=3, bytes=1000, read_s=0.5, errors={"digest": 1})
    counts.write_text(json.dumps(ShardCounts(run="run-abc", visits=4, hits=1, misses=3, tiers={"usb": traffic}).to_dict()))
    facts = {"device": "cuda", "vendor_flops": 1e6, "gpu_hour_usd": 2.0, "shard_counts": str(counts), "steps": 100}
    attempt = started(node, "run-abc", range(num_ranks), tiers={"usb": str(folder)}, **facts)
    for rank in range(num_ranks):
        record = recorder(attempt, rank)
        record.enter_steps()
        for step in range(1, 11):
            make_step(record, step, STEP_S)
        record.set(loss=2.5, rank_loss=2.5, validation_loss=2.75, gradient_norm=1.0, learning_rate=1e-3, loader_ready=4)
        record.set(memory_allocated=1.0, memory_reserved=2.0, memory_peak=3.0, tokens_per_s=300.0, measured_flops=5e5)
        record.checkpoint_committed(1000, {"copy": 1.0, "write": 2.0, "commit": 0.5}, time.time())
    scanner = Scanner(records_folder(node))
    sources: list[Source] = [RunSource(), RankSource(), ShardsSource(), HostSource(node.name, {})]
    sources.append(NvmlSource(RecordedReader(FILES / "nvml_snapshot.json"), node.name))
    return Collector(node.name, scanner.scan, sources)


def scrape(collector: Collector) -> str:
    collector_text = ""
    for _ in range(2):  # some sources read in the background, and the second answer knows how long the first took
        collector_text = generate_latest(collector).decode()  # type: ignore[arg-type]
        time.sleep(0.05)
    return collector_text


def test_a_whole_node_is_served_as_declared(tmp_path: Path) -> None:
    text = scrape(whole_node(tmp_path, 8))
    found = {family.name: family for family in parse(text)}
    for family in found.values():
        name = f"{family.name}_total" if family.type == "counter" else family.name
        metric = metrics.METRICS[name]
        assert (family.type, family.documentation) == (metric.kind, metric.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample
    names = {f"{name}_total" if family.type == "counter" else name for name, family in found.items()}
    assert set(metrics.METRICS) - names == set(), "declared, and not served by a node that has all of it"
    assert value(text, "outgrow_agent_errors_total", part="nvml") == 0
    num_series = len(values(text))
    assert num_series / 8 <= 150, f"{num_series} series for 8 ranks"


def test_values_are_those_of_the_record(tmp_path: Path) -> None:
    text = scrape(whole_node(tmp_path, 2))
    expected = {
        "outgrow_run_step": 10,
        "outgrow_run_planned_steps": 100,
        "outgrow_run_steps_total": 10,
        "outgrow_run_samples_total": 40,
        "outgrow_run_loss": 2.5,
        "outgrow_run_step_median_seconds": STEP_S,
        "outgrow_run_remaining_seconds": 90 * STEP_S,
        "outgrow_run_remaining_dollars": 90 * STEP_S / 3600 * 2.0 * 2,
        "outgrow_run_checkpoint_interval_seconds": 5 * STEP_S,
        "outgrow_run_step_seconds_count": 10,
        "outgrow_run_step_seconds_sum": 10 * STEP_S,
        "outgrow_run_checkpoint_bytes_total": 1000,
        "outgrow_run_active": 1,
        "outgrow_cache_hits_total": 1,
    }
    for name, wanted in expected.items():
        assert value(text, name) == pytest.approx(wanted), name
    assert value(text, "outgrow_run_tokens_total", kind="valid") == 1000
    assert value(text, "outgrow_run_tokens_total", kind="padding") == 280
    buckets = [value(text, "outgrow_run_step_seconds_bucket", le=le) for le in ("0.25", "0.5", "+Inf")]
    assert buckets == [0, 10, 10]
    flops_per_s = 600.0 * 100 / STEP_S
    assert value(text, "outgrow_run_mfu_ratio", ceiling="vendor") == pytest.approx(flops_per_s / 2e6)
    assert value(text, "outgrow_run_mfu_ratio", ceiling="measured") == pytest.approx(flops_per_s / 1e6)
    assert value(text, "outgrow_run_state", state="running") == 1
    assert value(text, "outgrow_rank_up", rank="1") == 1
    assert value(text, "outgrow_rank_memory_bytes", rank="1", kind="peak") == 3.0
    assert (value(text, "outgrow_rank_memory_bytes", rank="1", kind="anon") or 0) > 1e6


def test_openmetrics_is_well_formed(tmp_path: Path) -> None:
    encoder, kind = choose_encoder("application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5")
    assert kind.startswith("application/openmetrics-text")
    text = encoder(whole_node(tmp_path, 1)).decode()
    assert text.endswith("# EOF\n")
    assert "outgrow_run_steps" in {family.name for family in parse_openmetrics(text)}


def test_promtool_finds_nothing_to_say(tmp_path: Path) -> None:
    need("promtool")
    text = scrape(whole_node(tmp_path, 2))
    promtool = shutil.which("promtool")
    assert promtool
    done = subprocess.run([promtool, "check", "metrics"], input=text.encode(), capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_an_ended_run_keeps_its_counts_and_has_no_rates(tmp_path: Path) -> None:
    node = node_folder(site_at(tmp_path, 9640))
    attempt = started(node, "run")
    record = recorder(attempt)
    record.enter_steps()
    make_step(record, 1)
    record.set(tokens_per_s=100.0)
    scanner = Scanner(records_folder(node))
    collector = Collector("n", scanner.scan, [RunSource(), RankSource()])
    before = scrape(collector)
    assert value(before, "outgrow_run_tokens_per_second") == 100.0
    record.close("finished")
    text = scrape(collector)
    assert value(text, "outgrow_run_state", state="finished") == 1
    assert value(text, "outgrow_run_active") == 0
    assert value(text, "outgrow_run_steps_total") == 1
    for name in ("outgrow_run_tokens_per_second", "outgrow_run_mfu_ratio", "outgrow_run_remaining_seconds"):
        assert value(text, name) is None, name


def test_seconds_shown_before_a_restart_do_not_fall_after_it(tmp_path: Path) -> None:
    """Rank 0 may be the last that begins its record: meanwhile nothing is told of the run, and nothing forgotten."""
    node = node_folder(site_at(tmp_path, 9640))
    before = recorder(started(node, "run", (0, 1), attempt="a"))
    before.enter("checkpoint")
    source, scanner = RunSource(), Scanner(records_folder(node))
    time.sleep(0.3)

    def shown() -> dict[str, float]:
        found = source.samples(scanner.scan())
        return {one.labels[-1]: one.value for one in found if one.metric is metrics.RUN_WALL_SECONDS}

    first = shown()
    assert first["checkpoint"] > 0.3
    folder = attempt_folder(node, "run", time.time() + 1, "b")
    recorder(folder, 1)
    assert shown() == {}
    recorder(folder)
    assert shown()["checkpoint"] >= first["checkpoint"]
