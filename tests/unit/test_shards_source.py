"""Series of tiers and cache: every count of the prefetcher's file, and nothing of a file that is not such a one."""

from __future__ import annotations

import json
import os
import random
from dataclasses import fields, replace
from pathlib import Path

import pytest
from agent_runs import run_view

from outgrow.contracts import ShardCounts, TierTraffic
from outgrow.monitoring.agent.samples import Sample
from outgrow.monitoring.agent.shards import ShardsSource, read_shard_counts

COUNTS = ShardCounts(
    run="r",
    visits=100,
    hits=61,
    misses=39,
    fetches=38,
    refetches=7,
    evictions=12,
    healed=2,
    read_through=1,
    queue=3,
    cache_bytes=5_000_000,
    room_bytes=8_000_000,
    wait_s=1.25,
    tiers={
        "nvme": TierTraffic(shards=60, bytes=6_000_000, read_s=0.5),
        "far": TierTraffic(shards=39, bytes=3_900_000, read_s=40.5, errors={"timeout": 4, "5xx": 1}),
    },
)


def write(path: Path, counts: ShardCounts) -> str:
    aside = path.with_name("aside")
    aside.write_text(json.dumps(counts.to_dict()))
    aside.replace(path)
    return str(path)


def shown(samples: list[Sample]) -> dict[str, float]:
    found = [(" ".join((sample.metric.name, *sample.labels)), sample.value) for sample in samples]
    assert len(dict(found)) == len(found), "a series came twice"
    return {name.removeprefix("outgrow_"): value for name, value in found}


def test_every_count_is_shown_once(tmp_path: Path) -> None:
    view = run_view(run="r", host="n", shard_counts=write(tmp_path / "c.json", COUNTS))
    found = shown(list(ShardsSource().samples([view])))
    assert found == {
        "cache_hits_total r n": 61,
        "cache_misses_total r n": 39,
        "cache_fetches_total r n": 38,
        "cache_refetches_total r n": 7,
        "cache_evictions_total r n": 12,
        "cache_healed_total r n": 2,
        "cache_read_through_total r n": 1,
        "cache_queue_shards r n": 3,
        "cache_bytes r n": 5_000_000,
        "cache_room_bytes r n": 8_000_000,
        "cache_wait_seconds_total r n": 1.25,
        "tier_shards_total r n nvme": 60,
        "tier_bytes_total r n nvme": 6_000_000,
        "tier_read_seconds_total r n nvme": 0.5,
        "tier_shards_total r n far": 39,
        "tier_bytes_total r n far": 3_900_000,
        "tier_read_seconds_total r n far": 40.5,
        "tier_errors_total r n far timeout": 4,
        "tier_errors_total r n far 5xx": 1,
    }


def test_no_count_is_forgotten() -> None:
    """Each field alone must change what is shown; a visit is a hit or a miss, so visits need no series."""
    before = shown_of(COUNTS)
    for field in fields(ShardCounts):
        if field.name in ("run", "visits", "tiers"):
            continue
        assert shown_of(replace(COUNTS, **{field.name: getattr(COUNTS, field.name) + 1})) != before, field.name
    for field in fields(TierTraffic):
        if field.name != "errors":
            traffic = replace(COUNTS.tiers["far"], **{field.name: 1_000_000_000})
            assert shown_of(replace(COUNTS, tiers={**COUNTS.tiers, "far": traffic})) != before, field.name


def shown_of(counts: ShardCounts) -> dict[str, float]:
    from outgrow.monitoring.agent.shards import _samples

    return shown(list(_samples(("r", "n"), counts)))


def test_it_follows_the_file_and_stays_after_the_end(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    view = run_view(run="r", shard_counts=write(path, COUNTS))
    source = ShardsSource()
    assert shown(list(source.samples([view])))["cache_hits_total r n"] == 61
    write(path, replace(COUNTS, hits=62))
    assert shown(list(source.samples([view])))["cache_hits_total r n"] == 62
    ended = replace(view, state="finished")
    assert shown(list(source.samples([ended])))["cache_hits_total r n"] == 62


def test_runs_on_one_node_each_have_their_own(tmp_path: Path) -> None:
    views = [
        run_view(run="a", shard_counts=write(tmp_path / "a.json", replace(COUNTS, run="a"))),
        run_view(run="b", shard_counts=write(tmp_path / "b.json", replace(COUNTS, run="b", hits=5))),
        run_view(run="in place", shard_counts=""),
        run_view(run="not yet", shard_counts=str(tmp_path / "absent.json")),
    ]
    found = shown(list(ShardsSource().samples(views)))
    assert found["cache_hits_total a n"] == 61
    assert found["cache_hits_total b n"] == 5
    assert not [name for name in found if "in place" in name or "not yet" in name]


WHOLE = json.dumps(COUNTS.to_dict())


@pytest.mark.parametrize(
    "text",
    [
        "",
        WHOLE[: len(WHOLE) // 2],
        "[]",
        "null",
        "7",
        '"text"',
        "[" * 100_000,
        json.dumps({**COUNTS.to_dict(), "count_of_a_later_version": 1}),
        json.dumps({**COUNTS.to_dict(), "hits": "61"}),
        json.dumps({**COUNTS.to_dict(), "hits": None}),
        json.dumps({**COUNTS.to_dict(), "tiers": ["nvme"]}),
        json.dumps({**COUNTS.to_dict(), "tiers": {"nvme": 3}}),
        json.dumps({**COUNTS.to_dict(), "tiers": {"nvme": None}}),
        json.dumps({**COUNTS.to_dict(), "tiers": {"nvme": {"shards": 1, "bytes": 2, "read_s": 0.1, "errors": {"io": []}}}}),
        json.dumps({**COUNTS.to_dict(), "tiers": {"nvme": {"errors": 3}}}),
        WHOLE[:-1] + " " * (1 << 20) + "}",
    ],
)
def test_what_are_no_counts_gives_no_sample_and_no_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(text)
    assert list(ShardsSource().samples([run_view(shard_counts=str(path))])) == []


def test_torn_anywhere(tmp_path: Path) -> None:
    path, chance = tmp_path / "c.json", random.Random(5)
    for _ in range(200):
        data = bytearray(WHOLE.encode()[: chance.randrange(len(WHOLE) + 1)])
        for _ in range(chance.randrange(3)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        counts = read_shard_counts(str(path))
        assert counts is None or shown_of(counts)


def test_a_folder_or_a_file_of_somebody_else(tmp_path: Path) -> None:
    assert read_shard_counts(str(tmp_path)) is None
    path = tmp_path / "closed"
    path.write_text(WHOLE)
    path.chmod(0)
    if os.getuid() != 0:
        assert read_shard_counts(str(path)) is None


def test_a_cache_that_another_run_has_taken_over_says_nothing_of_the_one_before(tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", COUNTS)
    before, now = (run_view(run=run, host="n", shard_counts=path) for run in ("before", "r"))
    found = shown(list(ShardsSource().samples([before, now])))
    assert found
    assert not [name for name in found if " before " in f"{name} "]
