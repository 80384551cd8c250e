"""Runs of elements, as ZeRO cuts tensors: boxes that cover them, checkpoints that hold them, layouts that continue each
other."""

from __future__ import annotations

import random
from itertools import pairwise
from math import prod
from pathlib import Path

import pytest
import torch

from outgrow.contracts import CheckpointRef
from outgrow.errors import IntegrityError, ModelError
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import survey
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.reader import open_checkpoint
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.regions import FlatPart, Held, fill, local_parts, local_regions, run_boxes

RUN = "runs/flat"
SHAPES: dict[str, tuple[int, ...]] = {"scalar": (), "vector": (11,), "matrix": (7, 5), "wide": (1, 13), "cube": (3, 4, 5)}


def whole(name: str) -> torch.Tensor:
    """The tensor of that name, each element another one."""
    shape = SHAPES[name]
    return torch.arange(prod(shape), dtype=torch.float32).reshape(shape) + len(name) * 1000


def cut(rank: int, world: int, *, empty: bool = False) -> tuple[dict[str, Held], dict[str, torch.Tensor]]:
    """What ``rank`` holds of every tensor where each is cut into equal runs, the last shorter; and the memory it lies in."""
    held: dict[str, Held] = {}
    memory: dict[str, torch.Tensor] = {}
    for name, shape in SHAPES.items():
        numel = prod(shape)
        size = -(-numel // world)
        start = min(rank * size, numel)
        length = min(size, numel - start)
        run = whole(name).reshape(-1)[start : start + length].clone()
        memory[name] = torch.full_like(run, -1.0) if empty else run
        held[name] = FlatPart(shape, torch.float32, torch.device("cpu"), start, length, lambda name=name: memory[name])
    return held, memory


def test_boxes_of_a_run_are_its_elements_in_order() -> None:
    """Against the slow and obvious twin: the elements of the boxes, one after the other, are those of the run."""
    chance = random.Random(3)
    for _ in range(400):
        shape = tuple(chance.randint(1, 5) for _ in range(chance.randint(0, 4)))
        numbers = torch.arange(prod(shape)).reshape(shape)
        start = chance.randint(0, prod(shape))
        length = chance.randint(0, prod(shape) - start)
        boxes = list(run_boxes(shape, start, length))
        found = [number for box in boxes for number in numbers[box.slices].reshape(-1).tolist()]
        assert found == list(range(start, start + length)), (shape, start, length)
        assert len(boxes) <= max(1, 2 * len(shape) - 1)
        assert all(box.numel for box in boxes)


def test_a_run_of_a_matrix_is_at_most_three_boxes() -> None:
    assert [(box.offset, box.shape) for box in run_boxes((7, 5), 3, 20)] == [
        ((0, 3), (1, 2)),
        ((1, 0), (3, 5)),
        ((4, 0), (1, 3)),
    ]
    assert [(box.offset, box.shape) for box in run_boxes((7, 5), 6, 2)] == [((1, 1), (1, 2))]
    assert [(box.offset, box.shape) for box in run_boxes((7, 5), 5, 10)] == [((1, 0), (2, 5))]


def test_parts_are_views_of_the_run() -> None:
    held, memory = cut(1, 3)
    for part, region in local_parts(held["matrix"]):
        assert torch.equal(part, whole("matrix")[region.slices])
        part += 1
    first = local_regions(held["matrix"])[0]
    assert memory["matrix"][0] == whole("matrix")[first.slices].reshape(-1)[0] + 1


def test_values_are_not_asked_for_where_nothing_is_held() -> None:
    def never() -> torch.Tensor:
        raise AssertionError("it would have been read from a disk")

    assert local_parts(FlatPart((4, 4), torch.float32, torch.device("cpu"), 16, 0, never)) == []
    assert local_regions(FlatPart((4, 4), torch.float32, torch.device("cpu"), 3, 8, never))


def save(storage: Storage, world: int) -> CheckpointRef:
    """A checkpoint of all tensors, written by ``world`` ranks one after the other, the first of which commits it."""
    state = StepState(step=3, loader_state={}, recipe={}, metrics={})
    savers = [
        Checkpointer(storage, Group(RUN, "a", rank, world), cut(rank, world)[0], Retention(newest=1, best=0), patience_s=30)
        for rank in range(world)
    ]
    for rank, saver in reversed(list(enumerate(savers))):
        saver.save(cut(rank, world)[0], state)
    for saver in savers:
        saver.wait()
        assert not [result.error for result in saver.results() if result.error]
        saver.close()
    return next(iter(survey(storage, RUN).saved)).ref


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(1, 3), (3, 1), (2, 4), (4, 2), (5, 5)])
def test_runs_of_one_world_fill_those_of_another(saved_on: int, loaded_on: int, tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    reader = open_checkpoint(storage, save(storage, saved_on))
    for rank in range(loaded_on):
        held, memory = cut(rank, loaded_on, empty=True)
        for name, part in held.items():
            fill(part, name, reader)
        assert all(torch.equal(memory[name], expected) for name, expected in cut(rank, loaded_on)[1].items())
    for name in SHAPES:
        plain = torch.empty(SHAPES[name])
        fill(plain, name, reader)
        assert torch.equal(plain, whole(name))


def test_a_flipped_byte_in_a_run_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    ref = save(storage, 3)
    for path in sorted(tmp_path.rglob("rank-*.safetensors")):
        data = bytearray(path.read_bytes())
        data[-3] ^= 1
        path.write_bytes(data)
    reader = open_checkpoint(storage, ref)
    held, _ = cut(0, 2, empty=True)
    with pytest.raises(IntegrityError):
        for name, part in held.items():
            fill(part, name, reader)


def test_another_full_shape_is_refused(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    reader = open_checkpoint(storage, save(storage, 2))
    part = FlatPart((5, 7), torch.float32, torch.device("cpu"), 0, 35, lambda: torch.empty(35))
    with pytest.raises(ModelError, match=r"matrix has shape \(7, 5\)"):
        fill(part, "matrix", reader)


def test_each_element_is_written_once(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    reader = open_checkpoint(storage, save(storage, 4))
    for name, entry in reader._tensors.items():
        runs = sorted(
            int(torch.arange(prod(SHAPES[name])).reshape(SHAPES[name])[tuple(slice(o, o + 1) for o in piece.offset)])
            for piece in entry.pieces
        )
        assert all(a < b for a, b in pairwise(runs))
        assert sum(prod(piece.shape) for piece in entry.pieces) == prod(SHAPES[name])
