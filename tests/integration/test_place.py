"""``outgrow data place`` as a process of its own: killed half-way, on a disk that fills, and with a bucket on a real server."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from fault_proxy import s3_options, s3_server, s3_storage
from full_disk import small_disk
from kept_folders import (
    QUANTISED,
    STEP,
    STORE,
    WEIGHTS,
    Kept,
    copied_digests,
    flip,
    make_site,
    originals,
    write_all,
    write_weights,
)

from outgrow.recipes.placed import COPY_MARK, claim_key, record_key
from outgrow.storage import Storage, tree_digests
from outgrow.streaming import manifest
from outgrow.streaming.tiers import stock

SECRET = "a-secret-that-nobody-sees"
WAIT_S = 120


def words(kept: Kept, *more: str) -> list[str]:
    return [sys.executable, "-m", "outgrow", "data", "place", "--site", str(kept.root / "site.yaml"), *more]


def place(kept: Kept, *more: str, code: int = 0) -> str:
    """What the command prints, on either stream."""
    done = subprocess.run(words(kept, *more), capture_output=True, text=True, timeout=WAIT_S, env=environment())
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert SECRET not in done.stdout + done.stderr
    return done.stdout + done.stderr


def environment() -> dict[str, str]:
    return {**os.environ, "OUTGROW_TEST_SECRET": SECRET}


def write_site(kept: Kept, **changes: Any) -> None:
    site = kept.site.model_dump(mode="json", by_alias=True) | changes
    (kept.root / "site.yaml").write_text(yaml.safe_dump(site))


def write_large(root: Path, num_files: int = 4, file_bytes: int = 3_000_000) -> None:
    """A quantised cache that takes a while to copy."""
    folder = root / QUANTISED
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for number in range(num_files):
        (folder / f"{number}.safetensors").write_bytes(random.Random(number).randbytes(file_bytes))
    manifest.commit(folder, "manifest.json", {})


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    write_all(tmp_path)
    write_large(tmp_path / "storage")
    made = make_site(tmp_path, place={"quantised": ["slow"], "datasets": ["slow"]})
    write_site(made)
    return made


def end_while_copying(kept: Kept, folder: Path, num_bytes: int, how: signal.Signals = signal.SIGKILL) -> int:
    """Exit code of the command, which is sent a signal once so many bytes lie in ``folder``."""
    process = subprocess.Popen(words(kept, "--apply", "--limit", "4 MB/s"), env=environment())
    deadline = time.monotonic() + WAIT_S
    while sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < num_bytes:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    return process.wait()


def test_killed_again_and_again_it_goes_on_and_leaves_nothing(kept: Kept) -> None:
    before = originals(kept.root)
    aside = kept.folder("slow", "placing/quantised+q4")
    for num_bytes, how, code in ((10**6, signal.SIGKILL, -9), (5 * 10**6, signal.SIGINT, 130), (8 * 10**6, signal.SIGKILL, -9)):
        assert end_while_copying(kept, aside, num_bytes, how) == code
        assert not kept.folder("slow", QUANTISED).exists()
    whole = {path.name: path.stat() for path in aside.glob("*.safetensors")}
    assert len(whole) >= 2
    assert "all is in place" in place(kept, "--apply")
    for name, stat in whole.items():
        assert (kept.folder("slow", QUANTISED) / name).stat().st_ino == stat.st_ino
    assert kept.state(QUANTISED, "slow", read=True) == "copy"
    assert [path.name for path in kept.folder("slow", "placing").iterdir()] == [".lock"]
    assert originals(kept.root) == before


def test_beside_a_run_it_copies_what_comes_at_the_lowest_priority(kept: Kept) -> None:
    process = subprocess.Popen(words(kept, "--apply", "--every", "0.02"), env=environment(), stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: kept.folder("slow", QUANTISED).exists())
        assert psutil.Process(process.pid).nice() == 19
        write_large(kept.root / "other")
        shutil.copytree(kept.root / "other" / QUANTISED, kept.root / "storage/quantised/later")
        wait_for(lambda: kept.folder("slow", "quantised/later").exists())
    finally:
        process.terminate()
        process.wait()
    assert kept.state("quantised/later", "slow", read=True) == "copy"


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_two_at_once_make_one_copy(kept: Kept) -> None:
    both = [
        subprocess.Popen(words(kept, "--apply"), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=WAIT_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert kept.state(QUANTISED, "slow", read=True) == kept.state(STORE, "slow", read=True) == "copy"


def test_a_damaged_original_is_said_the_rest_is_copied_and_the_code_is_1(kept: Kept) -> None:
    flip(kept.folder("storage", QUANTISED) / "2.safetensors")
    said = place(kept, "--apply", code=1)
    assert f"{QUANTISED}: damaged (slow):" in said and "2.safetensors: the bytes differ from their digest" in said
    assert kept.state(STORE, "slow", read=True) == "copy"
    write_large(kept.root / "storage")
    assert [outcome.result for outcome in kept.apply()] == ["copied"]


def test_a_disk_that_is_really_full_keeps_what_is_whole(kept: Kept) -> None:
    with small_disk(kept.root / "slow", 8 * 2**20) as small:
        said = place(kept, "--apply", code=1)
        assert "slow: no: it needs 12.0 MB, 8." in said
        assert kept.state(STORE, "slow", read=True) == "copy"
        (small / "filler").write_bytes(bytes(5_000_000))
        assert kept.apply([(STEP, "slow")])[0].result == "copied"


# --- a bucket ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    pytest.importorskip("s3fs")
    with s3_server() as url:
        yield url


@pytest.fixture
def far(tmp_path: Path, server: str) -> tuple[Kept, Storage]:
    """A site with a bucket as its slowest tier, and that bucket."""
    write_all(tmp_path)
    name = f"bucket-{tmp_path.name.replace('_', '-')}"
    bucket = s3_storage(server, name)
    tiers = [
        {"name": "fast", "path": str(tmp_path / "fast"), "reserve": "0 B"},
        {"name": "far", "path": f"s3://{name}/some/prefix", "options": s3_options(server)},
    ]
    place = {"datasets": ["far"], "checkpoints": ["far"], "weights": ["far"], "quantised": ["far"]}
    kept = make_site(tmp_path, place=place, tiers=tiers)
    options = s3_options(server) | {"key": "${env:OUTGROW_TEST_SECRET}", "secret": "${env:OUTGROW_TEST_SECRET}"}
    write_site(kept, tiers=[tiers[0], {**tiers[1], "options": options}])
    return kept, bucket


def test_everything_goes_to_a_bucket_and_comes_back(far: tuple[Kept, Storage]) -> None:
    kept, bucket = far
    before = originals(kept.root)
    assert "all is in place" in place(kept, "--apply")
    placed = [item.at("far") for item in kept.stock(read=True).items]
    assert len(placed) == 5 and all(holding and holding.copied and not holding.problem for holding in placed)
    assert bucket.names("placing") == []
    for key, folder in ((STEP, "runs"), (QUANTISED, "quantised")):
        shutil.rmtree(kept.root / "storage" / folder)
        assert [outcome.result for outcome in kept.apply([(key, "storage")])] == ["copied"]
    after = originals(kept.root)
    assert {name: after[name] for name in before} == before
    assert all(name.split("/")[1] in ("placed", "placing") or COPY_MARK in name for name in set(after) - set(before))
    assert "removed from far" in place(kept, "--remove", STORE, "--from", "far")
    assert not bucket.names(STORE) and kept.state(STORE, "storage", read=True) == "original"


def test_killed_while_it_uploads_there_is_no_copy_and_then_a_whole_one(far: tuple[Kept, Storage]) -> None:
    kept, bucket = far
    write_large(kept.root / "storage")
    process = subprocess.Popen(words(kept, QUANTISED, "--apply", "--limit", "4 MB/s"), env=environment())
    wait_for(lambda: len(bucket.names(QUANTISED)) >= 2)
    process.kill()
    process.wait()
    assert not bucket.exists(f"{QUANTISED}/COMMITTED") and bucket.exists(claim_key(QUANTISED))
    assert kept.state(QUANTISED, "far") == "not finished"
    assert [outcome.result for outcome in kept.apply([(QUANTISED, "far")])] == ["copied"]
    assert kept.state(QUANTISED, "far", read=True) == "copy"


def test_a_damaged_copy_in_a_bucket_is_repaired_and_weights_come_back_from_it(far: tuple[Kept, Storage]) -> None:
    kept, bucket = far
    kept.apply([(WEIGHTS, "far"), (QUANTISED, "far")])
    key = f"{WEIGHTS}/model-00001-of-00002.safetensors"
    data = bytearray(bucket.read(key))
    data[-1] ^= 1
    bucket.write(key, bytes(data))
    assert "model-00001-of-00002.safetensors" in kept.state(WEIGHTS, "far", read=True)
    assert [outcome.result for outcome in kept.apply([(WEIGHTS, "far")], read=True)] == ["copied"]
    model = tree_digests(kept.root / "models/llama")
    shutil.rmtree(kept.root / "models/llama")
    assert [outcome.result for outcome in kept.apply([(WEIGHTS, "fast")])] == ["copied"]
    assert copied_digests(kept.folder("fast", WEIGHTS)) == model


def test_what_lies_in_a_bucket_is_not_trusted(far: tuple[Kept, Storage]) -> None:
    kept, bucket = far
    for name in ("$(touch pwned)", "a;b", "..", "x y"):
        bucket.fs.pipe_file(f"{bucket.root}/datasets/{name}/COMMITTED", b"0" * 64)
    bucket.write_json(record_key(STORE), {"key": "../../x"})
    said = place(kept, "--apply", WEIGHTS)
    assert said.count("is no name of a kept folder") == 4
    assert not list(kept.root.rglob("pwned"))


def test_a_bucket_that_does_not_answer_is_said_and_the_other_tiers_are_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_weights(tmp_path / "models/llama")
    (tmp_path / "storage").mkdir()
    tiers = [
        {"name": "fast", "path": str(tmp_path / "fast"), "reserve": "0 B"},
        {"name": "far", "path": "s3://nobody/x", "options": s3_options("http://127.0.0.1:9")},
    ]
    kept = make_site(tmp_path, place={"weights": ["far", "fast"]}, tiers=tiers)
    monkeypatch.setattr(stock, "PATIENCE_S", 2.0)
    start = time.monotonic()
    found = kept.stock()
    assert time.monotonic() - start < 20
    assert found.rooms["far"].problem.startswith("far: ") and any("far" in note for note in found.notes)
    assert [outcome.result for outcome in kept.apply()] == ["copied"]
