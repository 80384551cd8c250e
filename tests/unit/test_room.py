"""``Room``: how a cache is divided, which shards belong together, and the smallest that works."""

from __future__ import annotations

import numpy as np
import pytest
from token_stores import Dataset, documents, make_dataset

from outgrow.errors import DataError
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.sampler import validation_rows
from outgrow.streaming.tiers.room import Room, number_windows, validation_shards
from outgrow.streaming.tiers.shard_list import ShardList


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = tmp_path_factory.mktemp("room")
    streams = {
        "a": (documents(1, 150), documents(2, 60)),
        "b": (documents(3, 70), documents(4, 3)),
        "c": (documents(5, 40), []),
    }
    return make_dataset(root, streams, window_shards=3, shard_bytes=1000)


@pytest.fixture(scope="module")
def shards(dataset: Dataset) -> ShardList:
    return ShardList.open(dataset.root / "datasets/s", ["a", "b", "c"])


def open_index(dataset: Dataset) -> RowIndex:
    return RowIndex.open(dataset.root / dataset.card.indexes[0].folder)


def test_a_window_is_neighbours_of_one_stream_and_split(shards: ShardList) -> None:
    found = number_windows(shards, 3).tolist()
    expected, last = [], -1
    for split in ("train", "validation"):
        for stream in range(3):
            for place in range(len(shards.numbers(stream, split))):
                last += place % 3 == 0
                expected.append(last)
    assert found == expected
    assert any(len(shards.numbers(stream, "train")) % 3 for stream in range(3))  # the last window of a stream may be short


def test_the_rows_of_a_window_lie_in_its_shards(dataset: Dataset, shards: ShardList) -> None:
    windows, index = number_windows(shards, 3), open_index(dataset)
    for number, stream in enumerate(index.streams("train")):
        first, ends = shards.numbers(number, "train").start, shards.documents(number, "train")
        for window in range(len(stream.window_rows) - 1):
            rows = range(*stream.window_rows[window : window + 2].tolist())
            read = {first + int(np.searchsorted(ends, s.document, "right")) for row in rows for s in stream.spans(row)}
            assert {windows[shard] - windows[first] for shard in read} == {window}


@pytest.mark.parametrize("max_rows", [0, 1, 4])
def test_pinned_are_the_shards_that_validation_reads(dataset: Dataset, shards: ShardList, max_rows: int) -> None:
    index, expected = open_index(dataset), set()
    for number, stream in enumerate(index.streams("validation")):
        of_document = np.repeat(
            shards.numbers(number, "validation"), np.diff(shards.documents(number, "validation"), prepend=0)
        )
        for row in validation_rows(stream, max_rows):
            expected |= {int(of_document[span.document]) for span in stream.spans(row)}
    assert validation_shards(index, shards, max_rows) == tuple(sorted(expected))
    assert bool(expected) and (len(expected) < 8 or max_rows == 0)


def divide(total: int, shards: ShardList, pinned: tuple[int, ...] = ()) -> Room:
    return Room.divide(total, shards, number_windows(shards, 3), pinned)


def largest_windows(shards: ShardList) -> int:
    return sum(
        max(sum(sizes[at : at + 3]) for at in range(0, len(sizes), 3))
        for stream in range(3)
        for sizes in [[int(shards.num_bytes[shard]) for shard in shards.numbers(stream, "train")]]
    )


def test_the_smallest_cache_holds_a_window_of_each_stream_and_what_validation_reads(shards: ShardList) -> None:
    pinned = tuple(shards.numbers(0, "validation"))[:2]
    kept = sum(int(shards.num_bytes[shard]) for shard in pinned)
    smallest = largest_windows(shards) + kept
    room = divide(smallest, shards, pinned)
    assert room == Room(total=smallest, pinned=kept, planned=smallest - kept, ahead=0, smallest=smallest)
    room.check("here")
    with pytest.raises(
        DataError, match=rf"^here: .* {smallest - 1:,} bytes; the smallest that works has {smallest:,}: "
    ) as caught:
        divide(smallest - 1, shards, pinned).check("here")
    assert "lower data.window_shards" in caught.value.hint


def test_what_is_beyond_the_smallest_is_for_reading_ahead_up_to_two_windows(shards: ShardList) -> None:
    window, every = largest_windows(shards), int(shards.num_bytes[: shards.ends[2]].sum())
    for total in range(0, every + 500, 37):
        room = divide(total, shards)
        assert room.planned + room.ahead == room.unpinned == total
        if total >= every:
            assert room.ahead == 0  # nothing is ever replaced
        else:
            assert room.ahead == max(0, min(max(window, min(total // 4, 2 * window)), total - window))
            assert room.planned >= min(total, window)
