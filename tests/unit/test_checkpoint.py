"""Saving, committing, keeping and loading checkpoints; ranks that hold plain tensors are threads of one process here."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from full_disk import files_limited_to
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from outgrow.contracts import CheckpointRef
from outgrow.errors import ModelError, RunError
from outgrow.storage import Storage
from outgrow.trainers.checkpoint.catalog import Saved, list_checkpoints, newest
from outgrow.trainers.checkpoint.commit import Group, StepState, commit, write_data
from outgrow.trainers.checkpoint.format import Manifest, Part, Piece, TensorEntry, data_file
from outgrow.trainers.checkpoint.reader import open_checkpoint
from outgrow.trainers.checkpoint.resume import resume
from outgrow.trainers.checkpoint.retention import Retention, to_remove
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.checkpoint.tensor_file import encode_header, lay_out
from outgrow.trainers.regions import Region, fill

RUN = "runs/tiny"
CHECKPOINTS = f"{RUN}/checkpoints"
CHUNK = 1000
Tensors = dict[str, torch.Tensor]


def make_tensors(seed: int) -> Tensors:
    """A state with every dtype and shape that matters: scalars, vectors, more than one chunk, odd sizes, special values."""
    g = torch.Generator().manual_seed(seed)
    return {
        "model/embed": torch.randn(61, 17, generator=g),
        "model/norm": torch.randn(17, generator=g, dtype=torch.float64),
        "model/half": torch.randn(9, 3, 2, generator=g).bfloat16(),
        "model/special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "model/transposed": torch.randn(5, 8, generator=g).T,
        "optim/embed/step": torch.tensor(float(seed)),
        "buffer/mask": torch.tensor([True, False, True]),
        "buffer/count": torch.randint(0, 1 << 40, (7,), generator=g),
    }


def make_checkpointer(
    storage: Storage,
    tensors: Tensors,
    *,
    rank: int = 0,
    world: int = 1,
    attempt: str = "one",
    keep: int = 9,
    patience_s: float = 20,
) -> Checkpointer:
    group = Group(RUN, attempt, rank, world)
    return Checkpointer(storage, group, tensors, Retention(newest=keep, best=0), chunk_bytes=CHUNK, patience_s=patience_s)


def state_of(step: int, loss: float | None = None) -> StepState:
    return StepState(step, {"next_step": step}, {"run": {"name": "tiny"}}, {"validation_loss": loss})


def save(storage: Storage, step: int, *, attempt: str = "one", keep: int = 9, world: int = 1) -> Tensors:
    """Save ``make_tensors(step)`` from ``world`` ranks and give it back."""
    tensors = make_tensors(step)
    savers = [make_checkpointer(storage, tensors, rank=r, world=world, attempt=attempt, keep=keep) for r in range(world)]
    for saver in savers:
        saver.save(tensors, state_of(step))
    for saver in savers:
        saver.wait()
        assert saver.failures == 0, saver.results()
        saver.close()
    return tensors


def load(storage: Storage) -> tuple[int, Tensors]:
    """Step and tensors of the newest checkpoint that loads."""
    loaded = {name: torch.zeros_like(tensor) for name, tensor in make_tensors(0).items()}

    def fill_all(source: object) -> None:
        for name, tensor in loaded.items():
            fill(tensor, name, source)  # type: ignore[arg-type]

    resumed = resume(storage, RUN, fill_all)
    assert resumed.reader is not None
    return resumed.reader.step, loaded


def assert_bit_equal(actual: Tensors, expected: Tensors) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        got = actual[name].contiguous().flatten().view(torch.uint8)
        assert torch.equal(got, tensor.contiguous().flatten().view(torch.uint8)), name


@pytest.mark.parametrize("kind", ["local", "memory"])
@pytest.mark.parametrize("world", [1, 3])
def test_what_was_saved_comes_back_bit_equal(tmp_path: Path, kind: str, world: int) -> None:
    storage = Storage(str(tmp_path) if kind == "local" else f"memory://{uuid4()}")
    save(storage, 5, world=world)
    tensors = save(storage, 10, world=world)
    step, loaded = load(storage)
    assert step == 10
    assert_bit_equal(loaded, tensors)
    assert storage.names(CHECKPOINTS) == ["step-00000005", "step-00000010"]
    files = ["COMMITTED", "loader.json", "manifest.json", "pieces.json", *map(data_file, range(world)), "recipe.json"]
    assert storage.names(f"{CHECKPOINTS}/step-00000010") == files


def test_each_replicated_tensor_is_written_by_one_rank_and_the_bytes_are_spread(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tensors = {f"model/{i}": torch.randn(100, 10) for i in range(12)} | {
        f"optim/{i}/step": torch.tensor(1.0) for i in range(12)
    }
    savers = [make_checkpointer(storage, tensors, rank=rank, world=4) for rank in range(4)]
    assert sum(saver.buffer_bytes for saver in savers) == 12 * 4000 + 12 * 4
    assert {saver.buffer_bytes for saver in savers} == {3 * 4000 + 3 * 4}


def test_the_safetensors_package_reads_the_data_files(tmp_path: Path) -> None:
    tensors = save(Storage(str(tmp_path)), 3)
    with safe_open(tmp_path / CHECKPOINTS / "step-00000003" / data_file(0), "pt") as file:
        assert_bit_equal({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118


def test_a_rank_that_owns_nothing_writes_a_file_that_opens(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tensors = {"model/only": torch.ones(3)}
    savers = [make_checkpointer(storage, tensors, rank=rank, world=2) for rank in range(2)]
    for saver in savers:
        saver.save(tensors, state_of(1))
    ref = savers[0].wait()
    assert ref is not None
    assert torch.equal(open_checkpoint(storage, ref).read("model/only", Region((0,), (3,))), torch.ones(3))
    with safe_open(tmp_path / ref.folder / data_file(1), "pt") as file:
        assert not list(file.keys())


def test_a_save_keeps_the_values_of_its_moment(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tensors = {"model/w": torch.zeros(1_000_000)}
    saver = make_checkpointer(storage, tensors)
    saver.save(tensors, state_of(1))
    tensors["model/w"].fill_(7.0)
    ref = saver.wait()
    assert ref is not None
    assert open_checkpoint(storage, ref).read("model/w", Region((0,), (1_000_000,))).abs().max() == 0


def test_reader_tells_step_metrics_recipe_and_data_position(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tensors = make_tensors(0)
    saver = make_checkpointer(storage, tensors)
    saver.save(tensors, state_of(8, loss=2.5))
    ref = saver.wait()
    assert ref is not None and ref == newest(storage, RUN)
    assert ref.bytes == sum(storage.sizes(ref.folder)[name] for name in open_checkpoint(storage, ref).manifest.files)
    reader = open_checkpoint(storage, ref)
    assert (reader.step, reader.loader_state, reader.recipe) == (8, {"next_step": 8}, {"run": {"name": "tiny"}})
    assert reader.manifest.metrics == {"validation_loss": 2.5}
    assert reader.shape("model/embed") == (61, 17)
    assert reader.dtype("model/half") == torch.bfloat16
    with pytest.raises(ModelError, match="no tensor model/other"):
        reader.read("model/other", Region((0,), (1,)))
    with pytest.raises(ModelError, match="has shape"):
        reader.read("model/embed", Region((0, 1), (61, 17)))
    for shape in [(61, 18), (60, 17), (1037,)]:
        with pytest.raises(ModelError, match=r"model/embed has shape \(61, 17\); the model needs"):
            fill(torch.empty(shape), "model/embed", reader)
    (result,) = saver.results()
    assert (result.ref, result.error, result.step) == (ref, "", 8)
    assert saver.results() == []


def test_a_run_without_checkpoints_starts_anew(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert newest(storage, RUN) is None
    assert list_checkpoints(storage, RUN) == ()
    resumed = resume(storage, RUN, lambda reader: pytest.fail("nothing to load"))
    assert (resumed.reader, resumed.refused) == (None, ())


# --- boxes ------------------------------------------------------------------------------------------------------------


def cut(region: Region, draw: Callable[[int, int], int], depth: int) -> list[Region]:
    """``region`` in pieces: cut in two at a drawn place of a drawn dimension, each half again."""
    dims = [d for d, length in enumerate(region.shape) if length > 1]
    if depth == 0 or not dims:
        return [region]
    d = dims[draw(0, len(dims) - 1)]
    at = draw(1, region.shape[d] - 1)
    low = Region(region.offset, (*region.shape[:d], at, *region.shape[d + 1 :]))
    high = Region(
        (*region.offset[:d], region.offset[d] + at, *region.offset[d + 1 :]),
        (*region.shape[:d], region.shape[d] - at, *region.shape[d + 1 :]),
    )
    return cut(low, draw, depth - 1) + cut(high, draw, depth - 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_of_any_pieces_equals_the_slice_of_the_whole(data: st.DataObject) -> None:
    """The twin is plain slicing. Pieces cut any way, several of a tensor in one file, as the flat slices of ZeRO would need."""
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=0, max_size=3)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64]))
    whole = torch.randint(0, 1 << 15, shape).to(dtype)
    boxes = cut(Region.whole(shape), lambda a, b: data.draw(st.integers(a, b)), depth=3)
    storage = Storage(f"memory://{uuid4()}")
    group = Group(RUN, "one", 0, 2)
    parts = []
    for rank in range(2):
        mine = {f"w#{i}": box for i, box in enumerate(boxes) if i % 2 == rank}
        slots = lay_out((key, dtype, box.shape) for key, box in mine.items())
        body = b"".join(whole[mine[s.key].slices].contiguous().flatten().view(torch.uint8).numpy().tobytes() for s in slots)
        key = f"{CHECKPOINTS}/.saving-00000001-one/{data_file(rank)}"
        file = write_data(storage, key, encode_header(slots), memoryview(body), chunk_bytes=64)
        pieces = tuple(Piece(file=data_file(rank), key=k, offset=box.offset, shape=box.shape) for k, box in mine.items())
        name = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}[dtype]
        parts.append(Part(rank=rank, file=file, tensors={"w": TensorEntry(dtype=name, shape=shape, pieces=pieces)}))
    reader = open_checkpoint(storage, commit(storage, group, state_of(1), parts, chunk_bytes=64))
    for _ in range(5):
        offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        region = Region(offset, tuple(data.draw(st.integers(0, n - o)) for n, o in zip(shape, offset, strict=True)))
        assert torch.equal(reader.read("w", region), whole[region.slices])


# --- what to keep -----------------------------------------------------------------------------------------------------


def saved(step: int, loss: float | None) -> Saved:
    manifest = Manifest(step=step, world=1, attempt="a", saved=0.0, metrics={"validation_loss": loss}, chunk_bytes=1, files={})
    return Saved(CheckpointRef(folder=f"f{step}", step=step, digest="", bytes=0), manifest)


@pytest.mark.parametrize(
    ("losses", "step", "retention", "distrusted", "left"),
    [
        ({1: 3.0, 2: 2.0, 3: 1.0}, 3, Retention(1, 0), [], [3]),
        ({1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}, 4, Retention(2, 1), [], [1, 3, 4]),
        ({1: 1.0, 2: 2.0, 3: 3.0, 4: 0.5}, 4, Retention(1, 2), [], [1, 2, 4]),
        ({1: None, 2: 2.0, 3: None}, 3, Retention(1, 1), [], [2, 3]),
        ({1: 2.0, 2: 2.0, 3: 5.0}, 3, Retention(1, 1), [], [2, 3]),
        # Step 9 did not load and the run fell back: it counts for nothing, and no good one goes because of it.
        ({1: 3.0, 2: 2.0, 9: 1.0}, 2, Retention(1, 0), ["f9"], [2, 9]),
        ({1: 3.0, 2: 2.0, 9: 1.0}, 2, Retention(2, 0), [], [1, 2, 9]),
        ({1: 3.0, 2: 0.1, 3: 2.0, 4: 2.0}, 4, Retention(2, 1), ["f2"], [1, 2, 3, 4]),
        ({1: 3.0}, 1, Retention(2, 1), [], [1]),
    ],
)
def test_newest_and_best_are_kept(
    losses: dict[int, float | None], step: int, retention: Retention, distrusted: list[str], left: list[int]
) -> None:
    checkpoints = [saved(s, loss) for s, loss in losses.items()]
    gone = {s.ref.step for s in to_remove(checkpoints, step, retention, distrusted)}
    assert sorted(set(losses) - gone) == left


def test_old_checkpoints_go_when_a_new_one_is_committed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tensors = make_tensors(0)
    saver = Checkpointer(storage, Group(RUN, "one", 0, 1), tensors, Retention(newest=2, best=1), chunk_bytes=CHUNK)
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, 1.5), (50, 1.6)]:
        saver.save(tensors, state_of(step, loss))
        saver.wait()
    assert [ref.step for ref in list_checkpoints(storage, RUN)] == [50, 40, 20]
    assert storage.names(CHECKPOINTS) == ["step-00000020", "step-00000040", "step-00000050"]


def test_a_step_that_is_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    save(storage, 10)
    first = newest(storage, RUN)
    tensors = save(storage, 10, attempt="two", world=2)
    assert newest(storage, RUN) != first
    assert first is not None
    assert_bit_equal(load(storage)[1], tensors)
    assert storage.names(CHECKPOINTS) == ["step-00000010"]


def test_leftovers_of_killed_saves_are_cleared_at_the_start_and_whole_ones_stay(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    save(storage, 10)
    save(storage, 20)
    storage.write(f"{CHECKPOINTS}/.saving-00000030-dead/rank-00000.safetensors", b"half")
    storage.remove(f"{CHECKPOINTS}/step-00000020/COMMITTED")
    storage.write(f"{CHECKPOINTS}/notes.txt", b"of the user")
    make_checkpointer(storage, make_tensors(0), rank=1, world=2, attempt="two")
    assert len(storage.names(CHECKPOINTS)) == 4
    make_checkpointer(storage, make_tensors(0), attempt="two")
    assert storage.names(CHECKPOINTS) == ["notes.txt", "step-00000010"]


# --- saves that fail --------------------------------------------------------------------------------------------------


def test_a_full_disk_fails_the_save_and_nothing_else(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tensors = {"model/w": torch.arange(100_000.0)}
    saver = make_checkpointer(storage, tensors)
    saver.save(tensors, state_of(1))
    before = saver.wait()
    with files_limited_to(150_000):
        saver.save(tensors, state_of(2))
        assert saver.wait() == before
    assert saver.failures == 1
    assert "File too large" in saver.results()[-1].error
    assert storage.names(CHECKPOINTS) == ["step-00000001"]
    saver.save(tensors, state_of(3))
    saver.wait()
    assert [ref.step for ref in list_checkpoints(storage, RUN)] == [3, 1]


@pytest.mark.parametrize("limit", [0, 100, 300, 1000, 1500])
def test_a_disk_that_is_full_for_any_file_of_a_save_leaves_no_stray_file(tmp_path: Path, limit: int) -> None:
    storage = Storage(str(tmp_path))
    tensors = {"model/w": torch.arange(10.0)}
    saver = make_checkpointer(storage, tensors)
    saver.save(tensors, state_of(1))
    saver.wait()
    with files_limited_to(limit):
        saver.save(tensors, state_of(2))
        saver.wait()
    whole = ["step-00000001", "step-00000002"]
    assert storage.names(CHECKPOINTS) == whole[: 2 - saver.failures]
    assert len(list_checkpoints(storage, RUN)) == 2 - saver.failures


def test_the_failure_of_another_rank_reaches_rank_0(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tensors = {"model/a": torch.ones(10), "model/b": torch.ones(10)}
    savers = [make_checkpointer(storage, tensors, rank=rank, world=2) for rank in range(2)]
    savers[0].save(tensors, state_of(1))
    # A folder stands where rank 1 would write its file.
    (tmp_path / CHECKPOINTS / ".saving-00000001-one" / data_file(1)).mkdir(parents=True)
    savers[1].save(tensors, state_of(1))
    for saver in savers:
        saver.wait()
        assert saver.failures == 1
    assert "rank 1: IsADirectoryError" in savers[0].results()[0].error
    assert storage.names(CHECKPOINTS) == []


def test_a_rank_that_never_writes_is_named_after_a_bounded_wait(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tensors = make_tensors(0)
    saver = make_checkpointer(storage, tensors, world=3, patience_s=0.2)
    saver.save(tensors, state_of(1))
    assert saver.busy()
    assert saver.wait() is None
    assert "nothing from rank 1, 2 within 0 s" in saver.results()[0].error
    assert storage.names(CHECKPOINTS) == []


def test_close_gives_up_waiting_for_other_ranks(tmp_path: Path) -> None:
    tensors = make_tensors(0)
    saver = make_checkpointer(Storage(str(tmp_path)), tensors, world=2, patience_s=600)
    saver.save(tensors, state_of(1))
    start = time.monotonic()
    saver.close(grace_s=0.1)
    saver.wait()
    assert time.monotonic() - start < 10
    assert saver.failures == 1


def test_a_metric_that_is_no_number_is_not_committed(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    tensors = make_tensors(0)
    saver = make_checkpointer(storage, tensors)
    saver.save(tensors, state_of(1, loss=float("nan")))
    saver.wait()
    assert saver.failures == 1
    assert storage.names(CHECKPOINTS) == []


# --- agreement of ranks -----------------------------------------------------------------------------------------------


def together(world: int, work: Callable[[int, Callable[[str], list[str]]], object]) -> list[object]:
    """What ``work(rank, gather)`` returned, or raised, on each of ``world`` threads."""
    board: list[str] = [""] * world
    barrier = threading.Barrier(world, timeout=20)
    outcomes: list[object] = [None] * world

    def run(rank: int) -> None:
        def gather(text: str) -> list[str]:
            board[rank] = text
            barrier.wait()
            texts = list(board)
            barrier.wait()
            return texts

        try:
            outcomes[rank] = work(rank, gather)
        except Exception as error:
            outcomes[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def test_all_ranks_fall_back_where_one_finds_a_fault(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    save(storage, 10, world=2)
    save(storage, 20, world=2)
    path = tmp_path / CHECKPOINTS / "step-00000020" / data_file(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    def work(rank: int, gather: Callable[[str], list[str]]) -> object:
        def read_one_file(reader: object) -> None:
            for name, tensor in make_tensors(0).items():
                if reader._entry(name).pieces[0].file == data_file(rank):  # type: ignore[attr-defined]
                    fill(tensor, name, reader)  # type: ignore[arg-type]

        return resume(storage, RUN, read_one_file, gather)

    for outcome in together(2, work):
        assert outcome.reader.step == 10  # type: ignore[attr-defined]
        (refused,) = outcome.refused  # type: ignore[attr-defined]
        assert refused.folder.endswith("step-00000020")
        assert refused.reason.startswith("rank 1: ") and "differ from their digest" in refused.reason


def test_ranks_without_a_shared_storage_are_told_so(tmp_path: Path) -> None:
    storages = [Storage(str(tmp_path / str(rank))) for rank in range(2)]
    save(storages[0], 10)
    outcomes = together(2, lambda rank, gather: resume(storages[rank], RUN, lambda reader: None, gather))
    assert all(isinstance(outcome, RunError) and "none is seen by ranks 1" in str(outcome) for outcome in outcomes)


def test_a_checkpoint_that_one_rank_alone_cannot_see_is_not_used(tmp_path: Path) -> None:
    storages = [Storage(str(tmp_path / str(rank))) for rank in range(2)]
    save(storages[0], 10)
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    save(storages[0], 20)
    first, second = together(2, lambda rank, gather: resume(storages[rank], RUN, lambda reader: None, gather))
    assert first.reader.step == second.reader.step == 10  # type: ignore[attr-defined]
    assert [r.folder for r in first.refused] == [f"{CHECKPOINTS}/step-00000020"]  # type: ignore[attr-defined]


def test_listing_imports_no_torch() -> None:
    code = "import sys, outgrow.trainers.checkpoint.catalog; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
