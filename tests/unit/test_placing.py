"""Whole copies on real folders: made, kept, repaired, removed, and never at the cost of an original."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from kept_folders import (
    QUANTISED,
    STEP,
    STORE,
    WEIGHTS,
    Kept,
    checkpoint_contents,
    copied_digests,
    flip,
    make_site,
    originals,
    without_waiting_for_disks,
    write_all,
    write_checkpoint,
    write_dataset,
    write_weights,
)

from outgrow.cli import main
from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.placed import record_key, weights_folder
from outgrow.storage import Storage, tree_digests
from outgrow.streaming.tiers import placing
from outgrow.streaming.tiers.contents import stored_sizes, wrong_files
from outgrow.streaming.tiers.placing import Outcome
from outgrow.streaming.tiers.stock import Shelves
from outgrow.streaming.tiers.transfer import copy_verified

EVERYTHING = {"datasets": ["slow"], "weights": ["fast"], "quantised": ["slow"], "checkpoints": ["fast", "slow"]}


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    write_all(tmp_path)
    with without_waiting_for_disks():
        yield make_site(tmp_path, place=EVERYTHING)


def results(outcomes: list[Outcome]) -> dict[tuple[str, str], str]:
    return {(outcome.copy.key, outcome.copy.target): outcome.result for outcome in outcomes}


def index_key(kept: Kept) -> str:
    return next(item.key for item in kept.stock().items if "/rows-" in item.key)


# --- copies -----------------------------------------------------------------------------------------------------------


def test_every_kind_is_copied_whole_and_the_originals_are_as_they_were(kept: Kept) -> None:
    before, index = originals(kept.root), index_key(kept)
    made = results(kept.apply())
    wanted = {(STORE, "slow"), (index, "slow"), (WEIGHTS, "fast"), (QUANTISED, "slow"), (STEP, "fast"), (STEP, "slow")}
    assert made == dict.fromkeys(wanted, "copied")
    for key, place in wanted:
        source = kept.root / "models/llama" if key == WEIGHTS else kept.folder("storage", key)
        assert copied_digests(kept.folder(place, key)) == tree_digests(source)
        assert kept.state(key, place, read=True) == "copy"
    assert originals(kept.root) == before
    assert kept.plan() == []
    assert list(kept.folder("slow", "placing").iterdir()) == [kept.folder("slow", "placing/.lock")]


def test_a_row_index_that_came_later_is_added(kept: Kept) -> None:
    index = index_key(kept)
    later = kept.folder("storage", index)
    shutil.move(later, kept.root / "later")
    kept.apply()
    shutil.move(kept.root / "later", later)
    assert results(kept.apply()) == {(index, "slow"): "copied"}
    assert kept.state(STORE, "slow", read=True) == kept.state(index, "slow", read=True) == "copy"


@pytest.mark.parametrize("key", [STORE, STEP, QUANTISED])
def test_a_damaged_original_is_never_copied_and_the_others_are(kept: Kept, key: str) -> None:
    victim = max(kept.folder("storage", key).rglob("*.*"), key=lambda path: (path.suffix != ".json", path.stat().st_size))
    flip(victim)
    made = kept.apply()
    bad = [outcome for outcome in made if outcome.copy.key == key]
    assert bad and all(outcome.result == "damaged" and "differ" in outcome.message for outcome in bad)
    assert {outcome.result for outcome in made if outcome.copy.key.partition("/rows")[0] != key} == {"copied"}
    assert kept.state(key, "slow") == ""


def test_a_file_that_one_place_has_damaged_comes_from_another(kept: Kept) -> None:
    kept.apply([(STORE, "slow")])
    shard = next(kept.folder("storage", STORE).rglob("*.mds")).relative_to(kept.folder("storage", STORE))
    flip(kept.folder("slow", STORE) / shard)
    assert results(kept.apply([(STORE, "fast")])) == {(STORE, "fast"): "copied"}
    assert kept.state(STORE, "fast", read=True) == "copy"


@pytest.mark.parametrize("key", [STORE, STEP, QUANTISED, WEIGHTS])
def test_a_damaged_copy_is_found_by_reading_and_repaired(kept: Kept, key: str) -> None:
    kept.apply([(key, "slow")])
    victim = max(kept.folder("slow", key).rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    flip(victim)
    assert kept.state(key, "slow") == "copy"
    assert victim.name in kept.state(key, "slow", read=True)
    assert results(kept.apply([(key, "slow")], read=True)) == {(key, "slow"): "copied"}
    assert kept.state(key, "slow", read=True) == "copy"


@pytest.mark.parametrize("name", ["store.json", "COMMITTED"])
def test_a_copy_whose_manifest_or_marker_is_damaged_is_still_known_as_a_copy(kept: Kept, name: str) -> None:
    kept.apply([(STORE, "slow")])
    flip(kept.folder("slow", STORE) / name, 5)
    assert "differs" in kept.state(STORE, "slow")
    assert results(kept.apply([(STORE, "slow")])) == {(STORE, "slow"): "copied"}
    assert kept.state(STORE, "slow", read=True) == "copy"


def test_a_copy_that_lost_a_file_needs_no_reading_to_be_found(kept: Kept) -> None:
    kept.apply([(STEP, "slow")])
    (kept.folder("slow", STEP) / "rank-00000.safetensors").unlink()
    assert kept.plan([(STEP, "slow")])[0].repair
    kept.apply([(STEP, "slow")])
    assert kept.state(STEP, "slow", read=True) == "copy"


def test_weights_that_changed_are_copied_again_and_files_of_the_old_ones_go(kept: Kept) -> None:
    kept.apply([(WEIGHTS, "fast")])
    model = kept.root / "models/llama"
    for path in model.glob("model*"):
        path.unlink()
    write_weights(kept.root / "new", 9)
    shutil.copyfile(kept.root / "new/model-00001-of-00002.safetensors", model / "model.safetensors")
    assert results(kept.apply([(WEIGHTS, "fast")])) == {(WEIGHTS, "fast"): "copied"}
    assert copied_digests(kept.folder("fast", WEIGHTS)) == tree_digests(model)


def test_a_checkpoint_that_is_removed_meanwhile_is_no_damage(kept: Kept) -> None:
    copies = kept.plan([(STEP, "slow")])

    def remove_first(*arguments: Any, **options: Any) -> str:
        shutil.rmtree(kept.folder("storage", STEP), ignore_errors=True)
        return copy_verified(*arguments, **options)

    with patch.object(placing, "copy_verified", remove_first):
        outcome = kept.placer().place(copies[0])
    assert (outcome.result, outcome.message) == ("gone", f"{STEP} was removed or replaced while it was copied")
    assert list(kept.folder("slow", "placing").iterdir()) == [kept.folder("slow", "placing/.lock")]


def test_a_copy_that_is_there_by_now_is_not_made_again(kept: Kept) -> None:
    (copy,) = kept.plan([(STEP, "slow")])
    assert kept.placer().place(copy).result == "copied"
    assert kept.placer().place(copy).result == "there"


# --- room -------------------------------------------------------------------------------------------------------------


def test_capacity_counts_what_outgrow_copied(tmp_path: Path) -> None:
    write_all(tmp_path)
    kept = make_site(tmp_path, place={"weights": ["slow"], "quantised": ["slow"]}, capacity="5 kB")
    made = kept.plan()
    assert [(copy.key, bool(copy.refusal)) for copy in made] == [(QUANTISED, False), (WEIGHTS, True)]
    assert made[1].refusal.endswith("(free " + made[1].refusal.split("(free ")[1])
    assert "capacity 5.0 kB, taken 0 B" in made[1].refusal
    kept.apply()
    room = kept.stock().rooms["slow"]
    assert room.taken_bytes == kept.item(QUANTISED).at("slow").num_bytes  # type: ignore[union-attr]
    assert kept.plan()[0].refusal


def test_a_disk_that_fills_stops_the_copy_cleanly_and_it_goes_on_later(kept: Kept) -> None:
    before = originals(kept.root)
    free = iter([10**12] * 3 + [0] * 1000)
    with patch.object(Storage, "free_bytes", lambda self: next(free)):
        (copy,) = [made for made in kept.plan([(STORE, "slow")])]
        outcome = kept.placer().place(copy)
    assert outcome.result == "full" and "slow has 0 B free" in outcome.message
    assert kept.state(STORE, "slow") == ""
    assert results(kept.apply([(STORE, "slow")])) == {(STORE, "slow"): "copied"}
    assert originals(kept.root) == before


def test_a_disk_that_is_full_before_it_says_so_stops_the_copy_cleanly(kept: Kept) -> None:
    def full(*arguments: Any, **options: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with patch.object(placing, "copy_verified", full):
        assert [outcome.result for outcome in kept.apply([(STORE, "slow")])] == ["full"]
    assert results(kept.apply([(STORE, "slow")])) == {(STORE, "slow"): "copied"}


def test_a_disk_that_is_not_there_is_not_made_up(tmp_path: Path) -> None:
    write_all(tmp_path)
    kept = make_site(tmp_path, place={"datasets": ["slow"]}, path=str(tmp_path / "media/usb"))
    assert "the folder is not there" in kept.plan()[0].refusal
    assert any("media/usb" in note for note in kept.stock().notes)
    (copy, _) = make_site(tmp_path, place={"datasets": ["slow"]}).plan()
    outcome = kept.placer().place(copy)
    assert outcome.result == "refused" and not (tmp_path / "media").exists()


# --- removed ----------------------------------------------------------------------------------------------------------


def test_a_copy_is_removed_and_nothing_else(kept: Kept) -> None:
    before = originals(kept.root)
    kept.apply()
    for key in (index_key(kept), STORE, STEP):
        kept.remove(key, "slow")
        assert kept.state(key, "slow") == ""
        assert not kept.folder("slow", key).exists() and not kept.folder("slow", record_key(key)).exists()
    assert kept.state(STEP, "fast", read=True) == kept.state(QUANTISED, "slow", read=True) == "copy"
    assert originals(kept.root) == before


def test_originals_and_the_last_whole_one_are_not_removed(kept: Kept) -> None:
    kept.apply()
    with pytest.raises(DataError, match="is an original"):
        kept.remove(STEP, "storage")
    for place in ("storage", "fast"):
        shutil.rmtree(kept.folder(place, STEP))
    with pytest.raises(DataError, match="is the last one"):
        kept.remove(STEP, "slow")
    flip(kept.folder("storage", QUANTISED) / "manifest.json")
    with pytest.raises(DataError, match="is the last one"):
        kept.remove(QUANTISED, "slow")


def test_two_that_remove_at_once_leave_one_that_is_whole(kept: Kept) -> None:
    kept.apply([(STEP, "fast"), (STEP, "slow")])
    shutil.rmtree(kept.folder("storage", STEP))
    look = Shelves.item

    def look_and_wait(*arguments: Any) -> Any:
        item = look(*arguments)
        time.sleep(0.2)
        return item

    with patch.object(Shelves, "item", look_and_wait), ThreadPoolExecutor() as threads:
        said = [threads.submit(kept.placer().remove, "checkpoints", STEP, name).exception for name in ("fast", "slow")]
        errors = [error for error in (wait() for wait in said) if error is not None]
    assert [isinstance(error, DataError) and "is the last one" in str(error) for error in errors] == [True]
    assert sorted((kept.state(STEP, "fast", read=True), kept.state(STEP, "slow", read=True))) == ["", "copy"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "slow"], "--to TIER needs the folders"),
        (["--every", "1"], "--every copies again and again"),
        (["--remove", STEP], "--remove and --from go together"),
        (["--from", "slow"], "--remove and --from go together"),
        (["--remove", STEP, "--from", "slow", "--verify", "--json"], "--remove does not go with --verify, --json"),
        (["--limit", "fast"], "--limit"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "place", *words])
    assert ended.value.code and said in capsys.readouterr().err


def test_a_copy_in_which_somebody_put_something_is_not_removed(kept: Kept) -> None:
    kept.apply()
    key = index_key(kept)
    ours = kept.folder("slow", key)
    shutil.copytree(ours, ours.with_name("rows-0123456789abcdef"))  # an index that was built there, say
    kept.remove(key, "slow")
    with pytest.raises(DataError, match="that outgrow did not copy, such as 'rows-0123456789abcdef/"):
        kept.remove(STORE, "slow")
    assert ours.with_name("rows-0123456789abcdef").is_dir() and kept.state(STORE, "slow", read=True) == "copy"


def test_a_folder_that_replaced_a_copy_is_an_original(kept: Kept) -> None:
    kept.apply([(STEP, "slow")])
    shutil.rmtree(kept.folder("slow", STEP))
    write_checkpoint(Storage(str(kept.root / "slow")), 7, seed=99)
    assert kept.item(STEP).at("slow").copied is False  # type: ignore[union-attr]
    assert kept.plan([(STEP, "slow")]) == []


def test_the_same_folder_made_anew_in_the_place_of_a_copy_is_an_original(kept: Kept) -> None:
    kept.apply([(STORE, "slow"), (WEIGHTS, "fast")])
    for key, place, source in ((STORE, "slow", "storage/datasets/s"), (WEIGHTS, "fast", "models/llama")):
        shutil.rmtree(kept.folder(place, key))
        shutil.copytree(kept.root / source, kept.folder(place, key))
        assert kept.state(key, place) == "original"
        with pytest.raises(DataError, match="is an original"):
            kept.remove(key, place)


@pytest.mark.parametrize("marked", [False, True])
def test_what_outgrow_did_not_copy_is_never_overwritten(kept: Kept, marked: bool) -> None:
    copies = kept.plan([(STORE, "slow")])
    kept.folder("slow", STORE).mkdir(parents=True)
    (kept.folder("slow", STORE) / ("COMMITTED" if marked else "notes.txt")).write_text("mine")
    outcome = kept.placer().place(copies[0])
    assert outcome.result == "refused"
    assert [path.read_text() for path in kept.folder("slow", STORE).iterdir()] == ["mine"]


def test_a_copy_behind_a_link_is_not_outgrows_to_remove(kept: Kept) -> None:
    kept.apply([(STEP, "slow")])
    run = kept.folder("slow", STEP).parents[1]
    shutil.move(run, kept.root / "elsewhere")
    run.symlink_to(kept.root / "elsewhere")
    with pytest.raises(DataError, match="is an original"):
        kept.remove(STEP, "slow")


def test_one_process_at_a_time_writes_to_a_place(kept: Kept) -> None:
    import fcntl
    import threading

    waited = threading.Event()
    placer = kept.placer(on_wait=lambda place: waited.set())
    (copy,) = kept.plan([(STEP, "slow")])
    kept.folder("slow", "placing").mkdir(parents=True)
    with open(kept.folder("slow", "placing/.lock"), "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=placer.place, args=(copy,))
        thread.start()
        assert waited.wait(10)
        assert kept.state(STEP, "slow") == ""
    thread.join()
    assert kept.state(STEP, "slow") == "copy"


# --- what is not trusted ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../outside", "/etc/outside", "a/../../b", "", "a\\b", "./x"])
def test_a_manifest_with_a_name_that_leads_out_is_refused(kept: Kept, name: str) -> None:
    from outgrow.streaming import manifest

    folder = kept.folder("storage", QUANTISED)
    manifest.commit(folder, "manifest.json", {}, {name: "0" * 64})
    assert kept.apply([(QUANTISED, "slow")]) == []
    assert "names a file outside its folder" in kept.state(QUANTISED, "storage")
    assert not kept.folder("slow", QUANTISED).exists()


def test_a_hostile_record_is_no_record(kept: Kept) -> None:
    kept.apply([(WEIGHTS, "fast")])
    path = kept.folder("fast", record_key(WEIGHTS))
    record = json.loads(path.read_bytes())
    path.write_text(json.dumps(record | {"files": {"../../x": {"num_bytes": 0, "sha256": ""}}}))
    assert "names a file outside its folder" in kept.state(WEIGHTS, "fast")
    for text in ("[]", "{", json.dumps(record | {"key": STEP}), json.dumps(record | {"more": 1})):
        path.write_text(text)
        assert kept.shelves.record(kept.shelves.place("fast"), WEIGHTS) is None
    assert weights_folder(kept.site, "llama") == kept.root / "models/llama"


def test_names_with_shell_characters_are_refused_by_name(kept: Kept) -> None:
    for name in ("a;touch x", "$(id)", "-rf", "b c"):
        (kept.root / "storage/datasets" / name).mkdir()
    notes = kept.stock().notes
    assert sum("is no name of a kept folder" in note for note in notes) == 4
    assert any("'datasets/$(id)'" in note for note in notes)
    assert all(" " not in item.key for item in kept.stock().items)


# --- what is read of it ---------------------------------------------------------------------------------------------


def test_the_reader_of_checkpoints_knows_every_file(kept: Kept) -> None:
    storage = Storage(str(kept.root / "storage"))
    contents = checkpoint_contents(storage, STEP)
    assert wrong_files(storage, STEP, contents, stored_sizes(storage, STEP), read=True) == []
    assert set(contents.files) == {"manifest.json", "rank-00000.safetensors", "loader.json", "empty.json"}
    flip(kept.folder("storage", STEP) / "rank-00000.safetensors", 3400)
    assert wrong_files(storage, STEP, contents, stored_sizes(storage, STEP), read=True) == ["rank-00000.safetensors"]
    (kept.folder("storage", STEP) / "loader.json").unlink()
    with pytest.raises(IntegrityError, match="the file is missing"):
        checkpoint_contents(storage, STEP)


def test_a_dataset_is_where_a_run_looks_for_it(kept: Kept) -> None:
    kept.apply([(STORE, "slow")])
    assert [place.name for place in kept.shelves.places if place.holds(STORE)] == ["slow", "storage"]
    write_dataset(kept.root / "second")
    assert kept.shelves.place("slow").storage.names("datasets") == ["s"]
