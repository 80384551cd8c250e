"""``outgrow tiers``: what it says of healthy and of missing places, and that it tidies up what nobody uses alone."""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import fsspec
import pytest
import yaml

from outgrow.cli import main
from outgrow.contracts import ShardCounts, TierTraffic
from outgrow.recipes.placed import Placed, record_key
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.streaming.tiers import health
from outgrow.streaming.tiers.places import open_places
from outgrow.streaming.tiers.slot import Slot, take_slot

Run: TypeAlias = Callable[..., tuple[int, list[dict[str, str]], str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``outgrow tiers``: exit code, the lines of its first table as cells by column, and the rest of what it printed."""

    def go(*words: str) -> tuple[int, list[dict[str, str]], str]:
        with pytest.raises(SystemExit) as caught:
            main(["tiers", *words])
        out = capsys.readouterr()
        table, _, rest = out.out.partition("\n\n")
        return int(caught.value.code or 0), cells(table.splitlines()), rest + out.err

    return go


def cells(lines: list[str]) -> list[dict[str, str]]:
    """The rows of an aligned table by the names of its columns."""
    names = [name.strip() for name in lines[0].split("  ") if name.strip()]
    starts = [lines[0].index(name) for name in names]
    bounds = list(zip(names, starts, [*starts[1:], None], strict=True))
    return [{name: line[start:stop].strip() for name, start, stop in bounds} for line in lines[1:]]


def site_file(folder: Path, *tiers: dict[str, Any], **keys: Any) -> str:
    given = {"storage": str(folder / "nvme"), "cache": str(folder / "cache"), "tiers": list(tiers), **keys}
    (folder / "site.yaml").write_text(yaml.safe_dump(given))
    return str(folder / "site.yaml")


def tier(name: str, path: Path | str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "path": str(path), "reserve": "1 kB", **keys}


def slot(folder: Path, name: str, run: str, shard_bytes: int, counts: ShardCounts | None = None) -> Slot:
    """A held slot of the tier at ``folder`` with one shard in it."""
    hot = open_places(Site.model_validate({"tiers": [tier("nvme", folder)]}))[0]
    taken = take_slot(hot, f"datasets/{name}", run=run, dataset_bytes=5000, smallest=10, patience_s=0)
    shard = taken.folder / "streams/a/train/shard.00000.mds"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(bytes(shard_bytes))
    if counts is not None:
        (taken.folder / "counts.json").write_text(json.dumps(counts.to_dict()))
    return taken


def test_fill_speed_and_health_of_every_place(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=7 * 10**9))
    bucket = f"memory://bucket-{uuid.uuid4().hex}"
    record = Placed(key="datasets/y", kind="datasets", bytes=2_000_000, source="hdd", digest="d", time=0.0)
    Storage(str(tmp_path / "nvme")).write_json(record_key(record.key), record.to_dict())
    tiers = [
        tier("nvme", tmp_path / "nvme", capacity="800 GB"),
        tier("hdd", tmp_path / "hdd", speed="180 MB/s", reserve="8 GB"),
        tier("far", bucket),
    ]
    traffic = {"far": TierTraffic(bytes=10**8, read_s=4.0, errors={"timeout": 2, "5xx": 1})}
    counts = ShardCounts(visits=40, hits=30, tiers=traffic)
    with slot(tmp_path / "nvme", "x", "my-run", 3000, counts):
        code, rows, rest = run("--site", site_file(tmp_path, *tiers))
    nvme, hdd, far = rows
    assert code == 0
    assert (nvme["kind"], nvme["capacity"], nvme["copies"], nvme["shards"]) == ("disk", "800.0 GB", "2.0 MB", "3.0 kB")
    assert (nvme["free"], nvme["reserve"], nvme["speed"], nvme["health"]) == ("7.0 GB", "1.0 kB", "-", "ok")
    assert (hdd["speed"], hdd["health"]) == ("180.0 MB/s given", f"not there yet: made in {tmp_path} when needed")
    assert (far["kind"], far["free"], far["speed"]) == ("bucket", "-", "25.0 MB/s measured")
    assert (far["read errors"], far["health"]) == ("1 5xx, 2 timeout", "ok")
    (held,) = cells(rest.splitlines())
    assert (held["slot"], held["tier"], held["run"], held["taken"], held["room"]) == (
        "x.0",
        "nvme",
        "my-run",
        "3.0 kB",
        "5.0 kB",
    )
    assert held["state"].startswith("held by process ") and held["hits"] == "75.0% of 40"
    assert not (tmp_path / "hdd").exists(), "it only looks"
    assert not list(tmp_path.rglob(".outgrow-trial*")) and not fsspec.filesystem("memory").find(bucket[8:])


def test_a_tier_without_its_reserve_says_so(run: Run, tmp_path: Path) -> None:
    (tmp_path / "nvme").mkdir()
    code, rows, _ = run("--site", site_file(tmp_path, tier("nvme", tmp_path / "nvme", reserve="900 TB")))
    assert code == 0 and rows[0]["health"] == "less than reserve: is free"


def test_what_cannot_be_used_is_said_in_words_and_fails(run: Run, tmp_path: Path) -> None:
    (tmp_path / "nvme").mkdir()
    (tmp_path / "file").write_bytes(b"")
    tiers = [tier("nvme", tmp_path / "nvme"), tier("usb", tmp_path / "mnt/outgrow"), tier("odd", tmp_path / "file")]
    code, rows, _ = run("--site", site_file(tmp_path, *tiers))
    assert code == 1
    assert [row["health"] for row in rows] == [
        "ok",
        f"not there: {tmp_path}/mnt does not exist; is its disk mounted?",
        "File exists",
    ]
    assert not (tmp_path / "mnt").exists()


def test_a_bucket_that_is_away_is_given_up_soon_and_no_secret_shows(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "_PATIENCE_S", 0.3)
    monkeypatch.setenv("PLANTED", "hunter2")
    options = {"endpoint_url": "http://127.0.0.1:9", "key": "${env:PLANTED}", "secret": "${env:PLANTED}"}
    far = {"name": "far", "path": "s3://bucket/outgrow", "options": options}
    before = time.monotonic()
    code, rows, rest = run("--site", site_file(tmp_path, tier("nvme", tmp_path / "nvme"), far))
    assert time.monotonic() - before < 15
    assert code == 1 and rows[1]["health"].startswith("cannot write .outgrow-trial")
    assert "hunter2" not in f"{rows}{rest}"


def test_places_that_hang_hold_up_neither_the_others_nor_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, trial, over = ("nvme", "a", "b", "c", "d"), health._try_to_write, threading.Event()
    for name in names:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(health, "_ANSWER_S", 1.0)
    monkeypatch.setattr(health, "_try_to_write", lambda place: trial(place) if place.name == "nvme" else over.wait())
    site = Site.model_validate({"storage": str(tmp_path / "nvme"), "tiers": [tier(name, tmp_path / name) for name in names]})
    before = time.monotonic()
    states = health.examine(site)
    assert time.monotonic() - before < 3
    over.set()
    assert [state.problem for state in states] == ["", *["does not answer within 1 s"] * 4]


def test_clean_removes_what_no_run_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hot = tmp_path / "nvme"
    hot.mkdir()
    site = site_file(tmp_path, tier("nvme", hot))
    slot(hot, "free", "old-run", 3000).close()

    def go(*words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["tiers", *words])
        assert not caught.value.code
        return capsys.readouterr().out

    with slot(hot, "held", "new-run", 2000):
        assert go("clean", "--site", site, "--dry-run") == (
            "nvme: free.0, 3.0 kB of old-run, would be removed\n3.0 kB would be removed\n"
        )
        assert sorted(path.name for path in (hot / "shards").iterdir()) == [".lock", "free.0", "held.0"]
        assert go("--site", site, "clean") == "nvme: free.0, 3.0 kB of old-run, removed\n3.0 kB removed\n"
        assert sorted(path.name for path in (hot / "shards").iterdir()) == [".lock", "held.0"]
        assert go("clean", "--site", site) == "0 B removed\n"
