"""MDS folders: ours read by MosaicML's package, theirs read by us, hostile ones refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_stores import documents

from outgrow.errors import DataError, IntegrityError
from outgrow.storage import file_digest
from outgrow.streaming import _mosaic
from outgrow.streaming.mds import MdsFolder
from outgrow.streaming.shards import SHARDS, ShardTable, write_index


def write(folder: Path, **choices: Any) -> list[Any]:
    """A folder of ours; its documents' tokens."""
    docs = [tokens for tokens, _ in documents(7, 50)] + [np.arange(3000) % 900]
    options = {"vocab_size": 1000, "compression": "none", "shard_bytes": 2000, **choices}
    with _mosaic.DocumentWriter(folder, **options) as writer:
        for number, tokens in enumerate(docs):
            meta = json.dumps({"ünï": number})
            writer.write(tokens, source=f"file#{number}", meta=meta, spans=np.array([[0, 1], [1, 2]], np.int32))
    write_index(folder, writer.shards)
    ShardTable.of(writer.shards).save(folder)
    return docs


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_what_is_written_is_read_back(tmp_path: Path, compression: str, vocab_size: int, dtype: type) -> None:
    docs = write(tmp_path / "mds", compression=compression, vocab_size=vocab_size)
    folder = MdsFolder(tmp_path / "mds", file_digest(tmp_path / "mds" / SHARDS), open_shards=2)
    assert len(folder) == len(docs)
    for number in [*range(len(docs)), 3, 0]:
        sample = {name: folder.column(number, name) for name in folder.encodings}
        assert sample["tokens"].dtype == dtype
        np.testing.assert_array_equal(sample["tokens"], docs[number])
        assert (sample["source"], json.loads(sample["meta"])) == (f"file#{number}", {"ünï": number})
        assert (sample["weights"], np.frombuffer(sample["spans"], np.int32).tolist()) == (b"", [0, 1, 1, 2])


def test_a_document_larger_than_the_shard_limit_makes_no_empty_shard(tmp_path: Path) -> None:
    with _mosaic.DocumentWriter(tmp_path / "mds", vocab_size=9, compression="none", shard_bytes=1000) as writer:
        writer.write(np.ones(5000, np.int64), source="large")
        writer.write(np.ones(5, np.int64), source="small")
    assert [shard["samples"] for shard in writer.shards] == [1, 1]


def test_our_folders_are_opened_without_their_json_and_every_byte_is_checked(tmp_path: Path) -> None:
    write(tmp_path / "mds")
    (tmp_path / "mds/index.json").unlink()
    expected = file_digest(tmp_path / "mds" / SHARDS)
    assert MdsFolder(tmp_path / "mds", expected).column(0, "source") == "file#0"
    shard = tmp_path / "mds/shard.00001.mds"
    whole = shard.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], b""):
        shard.write_bytes(damaged)
        folder = MdsFolder(tmp_path / "mds", expected)
        with pytest.raises(IntegrityError, match=r"shard\.00001"):
            [folder.column(sample, "tokens") for sample in range(len(folder))]
    table = tmp_path / "mds" / SHARDS
    table.write_bytes(table.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IntegrityError, match=r"shards\.safetensors: the bytes differ"):
        MdsFolder(tmp_path / "mds", expected)
    table.unlink()
    with pytest.raises(IntegrityError, match=r"shards\.safetensors: the file is missing"):
        MdsFolder(tmp_path / "mds", expected)


def test_a_shard_that_was_checked_is_checked_again_when_it_is_another_file(tmp_path: Path) -> None:
    write(tmp_path / "mds")
    folder = MdsFolder(tmp_path / "mds", file_digest(tmp_path / "mds" / SHARDS), open_shards=1)
    folder.column(0, "tokens")
    shard = tmp_path / "mds/shard.00000.mds"
    whole = shard.read_bytes()
    folder.column(len(folder) - 1, "tokens")  # the first shard is unmapped
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(IntegrityError, match=r"shard\.00000"):
        folder.column(0, "tokens")


def test_a_plain_shard_beside_our_compressed_one_is_never_read(tmp_path: Path) -> None:
    docs = write(tmp_path / "mds", compression="zstd")
    (tmp_path / "mds/shard.00000.mds").write_bytes(b"planted")
    folder = MdsFolder(tmp_path / "mds", file_digest(tmp_path / "mds" / SHARDS))
    np.testing.assert_array_equal(folder.column(0, "tokens"), docs[0])


def test_a_sample_is_found_among_a_million_shards(tmp_path: Path) -> None:
    table = ShardTable(
        samples=np.tile(np.array([1, 3], np.int32), 500_000),
        raw_bytes=np.full(1_000_000, 2**26, np.int64),
        zip_bytes=np.zeros(1_000_000, np.int64),
        digest=np.zeros((1_000_000, 32), np.uint8),
    )
    table.save(tmp_path)
    folder = MdsFolder(tmp_path, file_digest(tmp_path / SHARDS))
    assert len(folder) == 2_000_000
    for sample, shard in [(0, 0), (1, 1), (3, 1), (4, 2), (1_999_999, 999_999)]:
        with pytest.raises(IntegrityError, match=rf"shard\.{shard:05}\.mds: the shard is missing"):
            folder.column(sample, "tokens")


@pytest.mark.filterwarnings(
    "ignore:Exception ignored.*index.json:pytest.PytestUnraisableExceptionWarning"
)  # they leave it open
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_mosaicmls_dataset_reads_what_we_write(tmp_path: Path, compression: str) -> None:
    from streaming import LocalDataset  # noqa: TID251

    docs = write(tmp_path / "mds", compression=compression)
    if compression == "zstd":  # LocalDataset opens plain shards alone; their own reader unpacks them
        return _compare_with_their_reader(tmp_path / "mds", docs)
    dataset = LocalDataset(str(tmp_path / "mds"))
    assert len(dataset) == len(docs)
    for number, tokens in enumerate(docs):
        np.testing.assert_array_equal(dataset[number]["tokens"], tokens)


def _compare_with_their_reader(folder: Path, docs: list[Any]) -> None:
    from streaming.base.compression import decompress  # noqa: TID251
    from streaming.base.format.mds.reader import MDSReader  # noqa: TID251

    shards = json.loads((folder / "index.json").read_bytes())["shards"]
    read = []
    for entry in shards:
        raw = decompress("zstd", (folder / entry["zip_data"]["basename"]).read_bytes())
        (folder / entry["raw_data"]["basename"]).write_bytes(raw)
        reader = MDSReader.from_json(str(folder), None, entry)
        read += [reader[place]["tokens"] for place in range(entry["samples"])]
    assert len(read) == len(docs)
    assert all(np.array_equal(one, other) for one, other in zip(read, docs, strict=True))


@pytest.mark.parametrize(
    ("encoding", "value"),
    [
        ("ndarray", np.arange(6, dtype=np.int64).reshape(2, 3)),
        ("ndarray:int32", np.arange(300, dtype=np.int32)),
        ("ndarray:uint8:2,2", np.arange(4, dtype=np.uint8).reshape(2, 2)),
        ("ndarray", np.ones((1, 70_000), np.uint16)),
        ("bytes", b"\x00\x01"),
        ("str", "naïve"),
    ],
)
def test_every_encoding_that_is_read_is_read_as_they_wrote_it(tmp_path: Path, encoding: str, value: Any) -> None:
    columns = {"a": "str", "number": "int", "value": encoding, "z": "bytes"}
    with _mosaic.MDSWriter(columns=columns, out=str(tmp_path / "mds"), hashes=["sha1", "xxh64"], size_limit=None) as writer:
        for number in range(3):
            writer.write({"a": "x" * number, "number": number, "value": value, "z": b"z"})
    folder = MdsFolder(tmp_path / "mds")
    assert folder.encodings == columns
    for number in range(3):
        np.testing.assert_array_equal(folder.column(number, "value"), value)
        assert folder.column(number, "a") == "x" * number
    with pytest.raises(DataError, match="its encoding is 'int'; read are: ndarray, bytes, str"):
        folder.column(0, "number")


@pytest.mark.parametrize("elements", ["(1,i4", "O", "object", "i4,i4", "float128", "", "(" * 500])
def test_elements_that_are_no_plain_numbers_are_refused(tmp_path: Path, elements: str) -> None:
    write(tmp_path / "mds")
    path = tmp_path / "mds/index.json"
    index = json.loads(path.read_bytes())
    at = index["shards"][0]["column_names"].index("tokens")
    for shard in index["shards"]:
        shard["column_encodings"][at] = f"ndarray:{elements}"
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match="column 'tokens' of sample 0 cannot be read: its elements are"):
        MdsFolder(tmp_path / "mds").column(0, "tokens")


@pytest.mark.parametrize("algorithm", ["sha1", "xxh64"])
def test_a_foreign_folder_is_checked_by_the_hashes_that_it_declares(tmp_path: Path, algorithm: str) -> None:
    with _mosaic.MDSWriter(columns={"t": "bytes"}, out=str(tmp_path / "mds"), hashes=[algorithm]) as writer:
        writer.write({"t": b"some bytes"})
    shard = tmp_path / "mds/shard.00000.mds"
    shard.write_bytes(shard.read_bytes().replace(b"some", b"same"))
    with pytest.raises(IntegrityError, match=algorithm):
        MdsFolder(tmp_path / "mds").column(0, "t")


def first(key: str, value: Any) -> Callable[[Any], Any]:
    return lambda index: index["shards"][0].__setitem__(key, value)


def first_file(key: str, value: Any) -> Callable[[Any], Any]:
    return lambda index: index["shards"][0]["raw_data"].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (first_file("basename", "../shard.00000.mds"), "not a file of this folder"),
        (first_file("basename", "/etc/passwd"), "not a file of this folder"),
        (first_file("basename", "a\0b"), "not a file of this folder"),
        (first_file("basename", ".."), "not a file of this folder"),
        (first_file("basename", ""), "not a file of this folder"),
        (first_file("basename", 5), "basename"),
        (first_file("basename", "shard.00001.mds"), "listed twice"),
        (first_file("bytes", 2**40), "less than or equal"),
        (first_file("bytes", -1), "greater than or equal"),
        (first("samples", 10**15), "do not fit"),
        (first("samples", -1), "greater than or equal"),
        (first("samples", True), "valid integer"),
        (first("column_encodings", ["pkl"] * 5), "pickles, which are never read"),
        (first("column_names", ["a"] * 5), "do not match"),
        (first("column_sizes", [None]), "do not match"),
        (first("column_sizes", [-4] * 5), "greater than or equal"),
        (first("compression", "br"), "'br' is not read"),
        (first("format", "json"), "'mds'"),
        (first("version", 1), "Input should be 2"),
        (lambda index: index.pop("shards"), "Field required"),
    ],
)
def test_a_hostile_index_is_refused(tmp_path: Path, change: Callable[[Any], Any], message: str) -> None:
    write(tmp_path / "mds")
    path = tmp_path / "mds/index.json"
    index = json.loads(path.read_bytes())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match=message) as caught:
        MdsFolder(tmp_path / "mds")
    assert caught.value.where == str(path)


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"[" * 100_000, b'{"version": 2, "shards": 3}'])
def test_what_is_no_index_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "index.json").write_bytes(text)
    with pytest.raises(DataError, match="not an MDS index"):
        MdsFolder(tmp_path)


def test_a_shard_that_contradicts_itself_is_refused_wherever_it_lies(tmp_path: Path) -> None:
    """Every uint32 of the offsets and of the first sample's sizes, replaced."""
    write(tmp_path / "mds")
    path = tmp_path / "mds/index.json"
    index = json.loads(path.read_bytes())
    for entry in index["shards"]:
        entry["raw_data"]["hashes"] = {}
    path.write_text(json.dumps(index))
    shard = tmp_path / "mds/shard.00000.mds"
    whole = shard.read_bytes()
    samples = index["shards"][0]["samples"]
    header = int(np.frombuffer(whole, "<u4", 1, 4)[0])
    places = [*range(0, 4 * (samples + 2), 4), *range(header, header + 20, 4)]
    for place in places:
        for value in {0, 1, 2**31, 2**32 - 1} - {int(np.frombuffer(whole, "<u4", 1, place)[0])}:
            shard.write_bytes(whole[:place] + np.uint32(value).tobytes() + whole[place + 4 :])
            with pytest.raises(DataError, match="offsets of the shard contradict"):
                MdsFolder(tmp_path / "mds").column(0, "tokens")


def test_a_zstd_bomb_stops_at_the_declared_size(tmp_path: Path) -> None:
    import zstandard

    write(tmp_path / "mds", compression="zstd")
    path = tmp_path / "mds/index.json"
    index = json.loads(path.read_bytes())
    zipped = index["shards"][0]["zip_data"]
    for data, message in [(zstandard.compress(bytes(50_000_000)), "does not unpack"), (b"no zstd frame", "not a zstd frame")]:
        (tmp_path / "mds" / zipped["basename"]).write_bytes(data)
        zipped.update(bytes=len(data), hashes={})
        path.write_text(json.dumps(index))
        with pytest.raises(IntegrityError, match=message):
            MdsFolder(tmp_path / "mds").column(0, "tokens")
