"""Damaged and hostile checkpoints: refused with a clean error, and the one before is used."""

from __future__ import annotations

import json
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from outgrow.contracts import JsonDict
from outgrow.errors import IntegrityError
from outgrow.storage import Storage, digest
from outgrow.trainers.checkpoint.catalog import list_checkpoints, newest
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.reader import CheckpointReader, open_checkpoint
from outgrow.trainers.checkpoint.resume import Resumed, resume
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.regions import Region, fill

RUN = "runs/tiny"
OLD, NEW = 10, 20
FILES = [
    "COMMITTED",
    "loader.json",
    "manifest.json",
    "pieces.json",
    "rank-00000.safetensors",
    "rank-00001.safetensors",
    "recipe.json",
]
CHUNK = 100


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return {
        "model/a": torch.randn(30, 40, generator=g),
        "model/b": torch.randn(30, 40, generator=g),
        "optim/a/step": torch.tensor(float(step)),
        "optim/b/step": torch.tensor(float(step)),
    }


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of two ranks at two steps."""
    root = tmp_path_factory.mktemp("pristine")
    storage = Storage(str(root))
    for step in (OLD, NEW):
        savers = [
            Checkpointer(storage, Group(RUN, "one", rank, 2), tensors_of(step), Retention(9, 0), chunk_bytes=CHUNK)
            for rank in range(2)
        ]
        for saver in savers:
            saver.save(tensors_of(step), StepState(step, {"next_step": step}, {"run": {"name": "tiny"}}, {}))
        for saver in savers:
            saver.wait()
            saver.close()
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


def folder(root: Path, step: int = NEW) -> Path:
    return root / RUN / "checkpoints" / f"step-{step:08d}"


def load(root: Path) -> Resumed:
    """Resume, and check that what was loaded is bit for bit what was saved at that step."""
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors_of(0).items()}

    def fill_all(reader: CheckpointReader) -> None:
        for name, tensor in loaded.items():
            fill(tensor, name, reader)

    resumed = resume(Storage(str(root)), RUN, fill_all)
    assert resumed.reader is not None
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors_of(resumed.reader.step).items())
    return resumed


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << position % 8
    path.write_bytes(data)


def test_the_undamaged_newest_is_used(root: Path) -> None:
    assert sorted(path.name for path in folder(root).iterdir()) == FILES
    resumed = load(root)
    assert resumed.reader is not None and resumed.reader.step == NEW
    assert resumed.refused == ()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_anywhere_is_refused_and_the_one_before_used(root: Path, name: str) -> None:
    path = folder(root) / name
    whole = path.read_bytes()
    draw = random.Random(name)
    positions = {0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(25))}
    for position in sorted(positions):
        flip(path, position)
        resumed = load(root)
        assert resumed.reader is not None and resumed.reader.step == OLD, position
        assert [refused.folder for refused in resumed.refused] == [f"{RUN}/checkpoints/step-{NEW:08d}"]
        path.write_bytes(whole)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("length", [0, 1, -1])
def test_a_truncated_file_is_refused(root: Path, name: str, length: int) -> None:
    path = folder(root) / name
    path.write_bytes(path.read_bytes()[:length])
    resumed = load(root)
    assert resumed.reader is not None and resumed.reader.step == OLD


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(root: Path, name: str) -> None:
    (folder(root) / name).unlink()
    resumed = load(root)
    assert resumed.reader is not None and resumed.reader.step == OLD
    # Without its marker it is no checkpoint at all: a save that was killed looks the same.
    assert len(resumed.refused) == (0 if name == "COMMITTED" else 1)


def test_files_of_another_checkpoint_are_refused(root: Path) -> None:
    for name in FILES:
        if name != "COMMITTED":
            shutil.copy(folder(root, OLD) / name, folder(root) / name)
    assert newest(Storage(str(root)), RUN) == list_checkpoints(Storage(str(root)), RUN)[-1]
    shutil.rmtree(folder(root))
    shutil.copytree(folder(root, OLD), folder(root))
    resumed = load(root)
    assert resumed.reader is not None and resumed.reader.step == OLD
    assert "the manifest is of step 10" in resumed.refused[0].reason


def test_a_checkpoint_replaced_after_it_was_chosen_is_refused(root: Path) -> None:
    storage = Storage(str(root))
    old, new = reversed(list_checkpoints(storage, RUN))
    shutil.rmtree(folder(root))
    shutil.copytree(folder(root, OLD), folder(root))
    with pytest.raises(IntegrityError):
        open_checkpoint(storage, new)
    assert open_checkpoint(storage, old).step == OLD


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_over_in_silence(root: Path) -> None:
    flip(folder(root, NEW) / "manifest.json", 40)
    flip(folder(root, OLD) / "rank-00001.safetensors", -1)
    with pytest.raises(IntegrityError, match="none of the committed checkpoints is whole") as caught:
        load(root)
    message = str(caught.value)
    assert "step-00000020" in message and "step-00000010" in message
    assert sorted(path.name for path in folder(root).parent.iterdir()) == ["step-00000010", "step-00000020"]


def test_bytes_that_change_after_a_first_read_are_not_trusted(root: Path) -> None:
    """Verified chunks are dropped as others come; one that is read again is verified again."""
    storage = Storage(str(root))
    ref = newest(storage, RUN)
    assert ref is not None
    reader = open_checkpoint(storage, ref)
    for name in reader.names():
        reader.read(name, Region.whole(reader.shape(name)))
    for rank in range(2):
        flip(folder(root) / f"rank-{rank:05d}.safetensors", 500)
    with pytest.raises(IntegrityError, match="differ from their digest"):
        for name in reader.names():
            reader.read(name, Region.whole(reader.shape(name)))


# --- checkpoints that somebody made: every digest holds ----------------------------------------------------------------


def resign(root: Path, **changed: bytes) -> None:
    """Replace files of the newest checkpoint (``pieces_json`` for pieces.json) and make all digests hold again."""
    path = folder(root)
    manifest = json.loads((path / "manifest.json").read_text())
    for key, data in changed.items():
        name = key.replace("_json", ".json").replace("rank0", "rank-00000.safetensors")
        (path / name).write_bytes(data)
        chunks = [digest(data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]
        manifest["files"][name] = {"size": len(data), "chunks": chunks}
    write_manifest(path, manifest)


def write_manifest(path: Path, manifest: JsonDict) -> None:
    data = json.dumps(manifest).encode()
    (path / "manifest.json").write_bytes(data)
    (path / "COMMITTED").write_text(digest(data) + "\n")


def refused_because(root: Path) -> str:
    resumed = load(root)
    assert resumed.reader is not None and resumed.reader.step == OLD
    (refused,) = resumed.refused
    return refused.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda piece: piece.update(file="../step-00000010/rank-00000.safetensors"), "should match pattern"),
        (lambda piece: piece.update(file="/etc/passwd"), "should match pattern"),
        (lambda piece: piece.update(file=".hidden"), "should match pattern"),
        (lambda piece: piece.update(file="rank-00009.safetensors"), "not a file of this checkpoint"),
        (lambda piece: piece.update(file="recipe.json"), "not a safetensors file"),
        (lambda piece: piece.update(key="optim/none"), "is not what pieces.json says"),
        (lambda piece: piece.update(offset=[1, 0]), "lies outside"),
        (lambda piece: piece.update(offset=[-1, 0]), "greater than or equal to 0"),
        (lambda piece: piece.update(shape=[29, 40]), "its pieces hold 1160 of 1200 elements"),
        (lambda piece: piece.update(offset=[0], shape=[1200]), "lies outside"),
        (lambda piece: piece.update(offset="0, 0"), "valid array"),
        (lambda piece: piece.update(code="print()"), "Extra inputs"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(root: Path, change: Callable[[JsonDict], None], reason: str) -> None:
    index = json.loads((folder(root) / "pieces.json").read_text())
    change(index["tensors"]["model/a"]["pieces"][0])
    resign(root, pieces_json=json.dumps(index).encode())
    assert reason in refused_because(root)


def test_pieces_that_overlap_and_leave_a_gap_of_the_same_size_are_refused(root: Path) -> None:
    index = json.loads((folder(root) / "pieces.json").read_text())
    entry = index["tensors"]["model/a"]
    entry["shape"] = [60, 40]
    entry["pieces"] = entry["pieces"] * 2
    resign(root, pieces_json=json.dumps(index).encode())
    assert "model/a: two of its pieces overlap" in refused_because(root)


@pytest.mark.parametrize("dtype", ["F16", "object", "BF16"])
def test_a_dtype_that_the_data_file_does_not_have_is_refused(root: Path, dtype: str) -> None:
    index = json.loads((folder(root) / "pieces.json").read_text())
    index["tensors"]["model/a"]["dtype"] = dtype
    resign(root, pieces_json=json.dumps(index).encode())
    assert "dtype" in (reason := refused_because(root)) or "is not what pieces.json says" in reason


def safetensors_file(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(5000)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        safetensors_file(b"{}", length=1 << 62),
        safetensors_file(b"{}", length=0),
        safetensors_file(b"not json"),
        safetensors_file(b"[1, 2]"),
        safetensors_file(b"\xff\xfe"),
        safetensors_file(b"[" * 100_000),
        safetensors_file(b'{"model/a": 3}'),
        safetensors_file(b'{"model/a": {"dtype": "F32", "shape": [30, 40]}}'),
        safetensors_file(b'{"model/a": {"dtype": "O", "shape": [30, 40], "data_offsets": [0, 4800]}}'),
        safetensors_file(b'{"model/a": {"dtype": "F32", "shape": [30, 40], "data_offsets": [0, 4]}}'),
        safetensors_file(b'{"model/a": {"dtype": "F32", "shape": [30, 40], "data_offsets": [-4800, 0]}}'),
        safetensors_file(b'{"model/a": {"dtype": "F32", "shape": [30, 40], "data_offsets": [4800, 9600]}}'),
        safetensors_file(b'{"model/a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4800]}}'),
        safetensors_file(b'{"model/a": {"dtype": "F32", "shape": [30, 40], "data_offsets": [0.0, 4800.0]}}'),
        safetensors_file(b'{"model/a": {"dtype": [], "shape": [30, 40], "data_offsets": [0, 4800]}}'),
        pickle.dumps({"model/a": [0.0] * 1200}),
    ],
    ids=range(18),
)
def test_a_bad_data_file_is_refused_with_a_clean_error(root: Path, data: bytes) -> None:
    resign(root, rank0=data)
    assert "rank-00000.safetensors" in refused_because(root)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format=2), "Input should be 1"),
        (lambda m: m.update(step=30), "the manifest is of step 30"),
        (lambda m: m.update(step="20"), "valid integer"),
        (lambda m: m.pop("world"), "Field required"),
        (lambda m: m.update(chunk_bytes=0), "greater than or equal to 1"),
        (lambda m: m["files"].update({"../../x": {"size": 0, "chunks": []}}), "should match pattern"),
        (lambda m: m["files"]["recipe.json"].update(chunks=[]), "0 digests for"),
        (lambda m: m["files"].pop("loader.json"), "not a file of this checkpoint"),
        (lambda m: m["files"].pop("pieces.json"), "not a file of this checkpoint"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(root: Path, change: Callable[[JsonDict], None], reason: str) -> None:
    manifest = json.loads((folder(root) / "manifest.json").read_text())
    change(manifest)
    write_manifest(folder(root), manifest)
    assert reason in refused_because(root)


@pytest.mark.parametrize("data", [b"", b"[]", b"nan", b"{", b"\x80\x04}q\x00."])
@pytest.mark.parametrize("name", ["loader_json", "recipe_json"])
def test_a_data_position_or_recipe_that_is_no_json_object_is_refused(root: Path, name: str, data: bytes) -> None:
    resign(root, **{name: data})
    assert "not JSON" in (reason := refused_because(root)) or "not a JSON object" in reason
