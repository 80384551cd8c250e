"""Copies that were killed at any point, disks that fill, and random histories of all that can happen to copies."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    copied_digests,
    flip,
    make_site,
    originals,
    without_waiting_for_disks,
    write_all,
    write_weights,
)

from outgrow.errors import DataError
from outgrow.recipes.placed import claim_key
from outgrow.storage import Storage, tree_digests
from outgrow.streaming.tiers import placing
from outgrow.streaming.tiers.transfer import copy_verified


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    write_all(tmp_path)
    with without_waiting_for_disks():
        yield make_site(tmp_path)


class Killed(BaseException):
    """Stands for the end of the process: nothing that runs after it changes a file."""


@contextmanager
def killed_after(num_changes: int) -> Iterator[None]:
    """Whatever changes a place works ``num_changes`` times, and never again."""
    left = num_changes

    def counted(action: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left <= 0:
                raise Killed
            left -= 1
            return action(*arguments, **options)

        return counting

    changing = [patch.object(Storage, name, counted(getattr(Storage, name))) for name in ("write", "rename", "remove")]
    with patch.object(placing, "copy_verified", counted(copy_verified)), changing[0], changing[1], changing[2]:
        yield


@pytest.mark.parametrize("key", [STORE, WEIGHTS, STEP])
def test_killed_at_any_point_there_is_a_whole_copy_or_none_and_the_next_one_finishes(kept: Kept, key: str) -> None:
    before = originals(kept.root)
    for num_changes in range(1000):
        shutil.rmtree(kept.root / "slow", ignore_errors=True)
        with suppress(Killed), killed_after(num_changes):
            kept.apply([(key, "slow")])
            break
        assert kept.state(key, "slow", read=True) in ("", "copy", "not finished")
        kept.apply([(key, "slow")])
        kept.placer().tidy(kept.stock())
        assert kept.state(key, "slow", read=True) == "copy"
        assert kept.shelves.claim(kept.shelves.place("slow"), key) is None
    assert num_changes > 5
    assert originals(kept.root) == before


def test_finished_files_are_kept_and_a_damaged_one_among_them_is_not(kept: Kept) -> None:
    with suppress(Killed), killed_after(4):  # the claim, and three files
        kept.apply([(STORE, "slow")])
    aside = kept.folder("slow", "placing/datasets+s")
    finished = [path for path in aside.rglob("*") if path.is_file() and path.suffix != ".part" and path.stat().st_size]
    assert finished
    flip(finished[0])
    times = {path: path.stat().st_mtime_ns for path in finished[1:]}
    kept.apply([(STORE, "slow")])
    assert kept.state(STORE, "slow", read=True) == "copy"
    assert all((kept.folder("slow", STORE) / path.relative_to(aside)).stat().st_mtime_ns == at for path, at in times.items())


def test_weights_that_changed_between_two_attempts_are_not_mixed(kept: Kept) -> None:
    with suppress(Killed), killed_after(5):
        kept.apply([(WEIGHTS, "slow")])
    write_weights(kept.root / "models/llama", 9)
    kept.apply([(WEIGHTS, "slow")])
    assert copied_digests(kept.folder("slow", WEIGHTS)) == tree_digests(kept.root / "models/llama")


def test_what_was_begun_of_a_folder_that_is_nowhere_any_more_is_cleared_away(kept: Kept) -> None:
    with suppress(Killed), killed_after(3):
        kept.apply([(STEP, "slow")])
    kept.apply([(QUANTISED, "slow")])
    shutil.rmtree(kept.folder("storage", STEP))
    shutil.rmtree(kept.folder("slow", QUANTISED))
    assert kept.placer().tidy(kept.stock()) == [f"{STEP} was begun on slow, and is nowhere any more: removed"]
    assert [path.name for path in kept.folder("slow", "placing").iterdir()] == [".lock"]
    assert list(kept.folder("slow", "placed").iterdir()) == []


def test_nothing_is_cleared_away_while_a_place_does_not_answer(tmp_path: Path) -> None:
    write_all(tmp_path)
    tiers = [
        {"name": "fast", "path": str(tmp_path / "fast"), "reserve": "0 B"},
        {"name": "slow", "path": str(tmp_path / "slow"), "reserve": "0 B"},
        {"name": "usb", "path": str(tmp_path / "media/usb"), "reserve": "0 B"},
    ]
    kept = make_site(tmp_path, tiers=tiers)
    with suppress(Killed), killed_after(3):
        kept.apply([(STEP, "slow")])
    shutil.rmtree(kept.folder("storage", STEP))
    assert kept.placer().tidy(kept.stock()) == []
    assert kept.folder("slow", claim_key(STEP)).exists()


@pytest.mark.parametrize("num_histories", [10, pytest.param(100, marks=pytest.mark.tiers)])
def test_after_random_histories_the_originals_are_whole_and_so_is_every_copy(kept: Kept, num_histories: int) -> None:
    before = originals(kept.root)
    for seed in range(num_histories):
        for place in ("fast", "slow"):
            shutil.rmtree(kept.root / place, ignore_errors=True)
        play(kept, random.Random(seed), before)


def play(kept: Kept, rng: random.Random, before: dict[str, str]) -> None:
    """One history: copies made, killed, removed and damaged, disks full, in random order."""
    keys = [item.key for item in kept.stock().items]
    damaged: set[Path] = set()
    for _ in range(6):
        wanted = [(rng.choice(keys), rng.choice(["fast", "slow"]))]
        act = rng.choice(["apply", "apply", "kill", "kill", "remove", "full", "damage"])
        if act == "apply":
            made = kept.apply(wanted, read=True)
            assert all(outcome.result == "copied" for outcome in made)
        elif act == "kill":
            with suppress(Killed), killed_after(rng.randrange(20)):
                kept.apply(wanted, read=True)
        elif act == "full":
            free = rng.randrange(20_000)
            with patch.object(Storage, "free_bytes", lambda self, free=free: free):
                kept.apply(wanted)
        elif act == "remove":
            with suppress(DataError), suppress(Killed), killed_after(rng.choice([2, 1000])):
                kept.remove(*wanted[0])
        else:
            files = [path for path in kept.folder(*reversed(wanted[0])).rglob("*.safetensors") if path.is_file()]
            for path in files[:1]:
                flip(path)
                damaged.add(path)
        assert originals(kept.root) == before
        damaged = {path for path in damaged if path.exists()}
        for item in kept.stock(read=True).items:
            for holding in item.holdings:
                folder = kept.folder(holding.place or "models", item.key)
                if not any(path.is_relative_to(folder) for path in damaged):
                    assert holding.problem in ("", "not finished")
