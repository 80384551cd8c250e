"""What is to be copied where: from what lies there, what is wanted, and what there is room for."""

from __future__ import annotations

from typing import Any

import pytest

from outgrow.recipes.schema.tiers import Placement
from outgrow.streaming.tiers.placement import (
    OUTSIDE,
    Copy,
    Holding,
    Item,
    Room,
    plan_copies,
    removal_refusal,
    wanted_copies,
)

GB = 10**9
ROOMY = {"nvme": Room(), "hdd": Room(), "storage": Room()}


def holding(place: str, *, copied: bool = False, version: str = "v1", num_bytes: int = GB, problem: str = "") -> Holding:
    return Holding(place=place, copied=copied, version=version, num_bytes=num_bytes, problem=problem)


def item(*holdings: Holding, key: str = "datasets/a", kind: Any = "datasets") -> Item:
    return Item(key=key, kind=kind, holdings=holdings)


def plan(given: Item, target: str = "hdd", **rooms: Room) -> list[Copy]:
    return plan_copies([given], [(given, target)], ROOMY | rooms, {"storage": 100e6, "hdd": 50e6})


def test_what_the_site_wants_is_wanted_by_kind() -> None:
    dataset, checkpoint = item(), item(key="runs/r/checkpoints/step-00000001", kind="checkpoints")
    place = Placement(datasets=("nvme", "hdd"), checkpoints=("hdd",))
    assert wanted_copies([dataset, checkpoint], place) == [(dataset, "nvme"), (dataset, "hdd"), (checkpoint, "hdd")]


def test_a_missing_copy_is_made_from_what_is_whole_at_the_slower_speed_of_the_two() -> None:
    (copy,) = plan(item(holding("nvme", copied=True, problem="1 file is missing"), holding("storage")))
    assert (copy.sources, copy.repair, copy.num_bytes, copy.seconds, copy.refusal) == (("storage",), False, GB, 20.0, "")


def test_an_original_and_a_whole_copy_are_left_alone() -> None:
    assert plan(item(holding("hdd"), holding("storage"))) == []
    assert plan(item(holding("hdd", problem="damaged"), holding("storage"))) == []
    assert plan(item(holding("hdd", copied=True), holding("storage"))) == []


@pytest.mark.parametrize("there", [{"problem": "damaged"}, {"version": "v0"}], ids=["damaged", "older"])
def test_a_damaged_or_older_copy_is_made_again(there: dict[str, str]) -> None:
    (copy,) = plan(item(holding("hdd", copied=True, num_bytes=GB // 4, **there), holding("storage")))
    assert copy.repair and copy.sources == ("storage",) and copy.num_bytes == GB - GB // 4


def test_the_version_of_a_whole_original_counts() -> None:
    damaged, whole, copy = holding("nvme", version="v0", problem="damaged"), holding("hdd"), holding("storage", copied=True)
    assert item(damaged, whole, copy).version == "v1"
    assert item(damaged, whole, copy).whole == (whole, copy)
    assert item(damaged, holding("hdd", copied=True, version="v0")).version == "v0"
    assert item(holding("hdd", version="", problem="unreadable")).version == ""


def test_what_nobody_has_whole_is_refused() -> None:
    (copy,) = plan(item(holding("storage", problem="damaged")))
    assert copy.refusal == "no place has it whole"


def test_room_is_what_disk_and_capacity_leave() -> None:
    disk = Room(free_bytes=10 * GB, reserve_bytes=2 * GB, promised_bytes=3 * GB, capacity_bytes=20 * GB, taken_bytes=16 * GB)
    assert disk.left_bytes == 4 * GB
    assert Room(free_bytes=GB, reserve_bytes=2 * GB).left_bytes == 0
    assert Room().left_bytes is None


def test_what_does_not_fit_is_refused_and_what_fits_after_it_is_not() -> None:
    items = [item(holding("storage", num_bytes=size * GB), key=f"datasets/{size}") for size in (3, 9, 2)]
    wanted = [(each, "hdd") for each in items]
    copies = plan_copies(items, wanted, ROOMY | {"hdd": Room(free_bytes=7 * GB, reserve_bytes=2 * GB)}, {})
    assert [bool(copy.refusal) for copy in copies] == [False, True, False]
    assert copies[1].refusal == "it needs 9.0 GB, 2.0 GB are left (free 7.0 GB, reserve 2.0 GB)"
    assert copies[0].seconds is None


def test_what_an_earlier_attempt_wrote_needs_no_room_again() -> None:
    room = Room(free_bytes=GB // 2, begun={"datasets/a": 3 * GB // 4})
    (copy,) = plan(item(holding("storage")), hdd=room)
    assert (copy.num_bytes, copy.refusal) == (GB // 4, "")


def test_a_place_that_does_not_answer_is_the_reason() -> None:
    (copy,) = plan(item(holding("storage")), hdd=Room(problem="hdd: the folder is not there"))
    assert copy.refusal == "hdd: the folder is not there"


def test_a_row_index_goes_only_where_its_store_is() -> None:
    store, index = item(holding("storage")), item(holding("storage"), key="datasets/a/rows-1")
    both = plan_copies([store, index], [(store, "hdd"), (index, "hdd")], ROOMY, {})
    assert [copy.refusal for copy in both] == ["", ""]
    (alone,) = plan_copies([store, index], [(index, "hdd")], ROOMY, {})
    assert alone.refusal == "its store datasets/a is not there"
    placed = item(holding("hdd", copied=True), holding("storage"))
    (after,) = plan_copies([placed, index], [(index, "hdd")], ROOMY, {})
    assert not after.refusal


def test_only_a_copy_that_is_whole_elsewhere_may_be_removed() -> None:
    assert removal_refusal(item(holding("hdd", copied=True), holding("storage")), "hdd") == ""
    assert "does not lie on hdd" in removal_refusal(item(holding("storage")), "hdd")
    assert "is an original" in removal_refusal(item(holding("hdd"), holding("storage")), "hdd")
    for others in ((), (holding("storage", problem="damaged"),), (holding(OUTSIDE, version="v2", problem="damaged"),)):
        assert "is the last one" in removal_refusal(item(holding("hdd", copied=True), *others), "hdd")
