"""Loading takes little beyond what a rank then holds: ranks are watched from outside while they load a base of 230 MB.

``benchmarks/load_memory.py`` does the same with 2.2 GB. The bound is twice the largest layer; here, where Python and torch
alone are larger than that, what was there before the load is taken off, and the embedding of 98 MB is enough by itself.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
from big_models import BIG, SMALL, Shape, write_folder
from load_ranks import Case, Loaded, can_limit_memory, load, started


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("weights") / "base", SMALL)


def in_bytes(shape: Shape) -> int:
    """The largest layer as the files have it."""
    return shape.largest_layer * 2


def beyond(ranks: list[Loaded]) -> int:
    """The most that a rank took beyond its shard and what it had before."""
    return max(rank.overhead - rank.before for rank in ranks)


def test_nf4_killed_while_it_is_made_then_made_then_read_in_a_cgroup(small: Path, tmp_path: Path) -> None:
    """In the end it is read by a rank whose cgroup has room for its shard and little more, and for no other copy."""
    case, quantised = Case(base=str(small), cache=str(tmp_path / "cache"), method="nf4"), tmp_path / "cache/quantised"
    with started(case, tmp_path):
        while not list(quantised.glob(".making-*/*.safetensors")):
            time.sleep(0.005)
    (left,) = quantised.glob(".making-*")
    assert {path.name for path in quantised.iterdir()} == {".lock", left.name}
    (made,) = load(case, tmp_path)
    assert beyond([made]) <= in_bytes(SMALL)
    assert not left.exists() and [path.is_dir() for path in quantised.iterdir()].count(True) == 1
    if not can_limit_memory():
        pytest.skip("no memory cgroup can be made here: the limits of memory are not tested")
    limit = int(1.2 * (made.before + made.shard + in_bytes(SMALL)))
    (again,) = load(replace(case, limit_bytes=limit), tmp_path)
    assert beyond([again]) <= in_bytes(SMALL)


@pytest.mark.parity
@pytest.mark.parametrize("method", ["full", "lora", "nf4"])
@pytest.mark.parametrize("world", [1, 2])
def test_every_method_on_one_rank_and_two(method: str, world: int, small: Path, tmp_path: Path) -> None:
    assert beyond(load(Case(base=str(small), cache=str(tmp_path / "cache"), method=method, world=world), tmp_path)) <= (
        in_bytes(SMALL)
    )


@pytest.mark.parity
@pytest.mark.timeout(1200)
def test_gigabytes_take_no_more_than_twice_the_largest_layer(tmp_path: Path) -> None:
    """All of the process counts, Python and torch too."""
    base = write_folder(tmp_path / "base", BIG)
    for method in ("lora", "nf4"):
        (rank,) = load(Case(base=str(base), cache=str(tmp_path / "cache"), method=method), tmp_path)
        assert rank.overhead <= 2 * in_bytes(BIG), method
