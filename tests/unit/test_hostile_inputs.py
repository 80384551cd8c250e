"""What comes from outside is hostile until proven: refused by name, in bounded memory; nothing is written elsewhere."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml
import zstandard
from opened_sources import everything, opened, refused
from safetensors.numpy import load_file, save
from text_recipes import make_recipe, text_stream
from token_stores import Dataset, documents, make_dataset

from outgrow.cli import main
from outgrow.errors import DataError, IntegrityError
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage, digest, file_digest, tree_digests
from outgrow.streaming import _mosaic
from outgrow.streaming.catalog import remembered, section_key
from outgrow.streaming.fetch import local_dataset
from outgrow.streaming.mds import MdsFolder
from outgrow.streaming.rows import RowIndex
from outgrow.streaming.shards import SHARDS, ShardTable

SECRET = "the text of another file"


# --- an MDS folder of someone else ------------------------------------------------------------------------------------


def foreign(folder: Path, *, compression: str | None = None) -> dict[str, Any]:
    """A folder as MosaicML's writer leaves it, with one shard; its index."""
    tokens = [np.arange(10, dtype=np.int64), np.arange(7, dtype=np.int64)]
    columns = {"tokens": "ndarray:int64", "mark": "int8"}
    with _mosaic.MDSWriter(columns=columns, out=str(folder), compression=compression, hashes=["sha1"]) as writer:
        for number, own in enumerate(tokens):
            writer.write({"tokens": own, "mark": np.int8(number)})
    index: dict[str, Any] = json.loads((folder / "index.json").read_text())
    return index


def rewrite(folder: Path, index: dict[str, Any]) -> None:
    (folder / "index.json").write_text(json.dumps(index))


def read_all(folder: Path) -> list[Any]:
    opened = MdsFolder(folder)
    return [opened.column(sample, "tokens") for sample in range(len(opened))]


def test_the_folder_itself_is_read(tmp_path: Path) -> None:
    for compression in (None, "zstd"):
        foreign(tmp_path / f"{compression}", compression=compression)
        assert [len(tokens) for tokens in read_all(tmp_path / f"{compression}")] == [10, 7]


def link(path: Path, outside: Path) -> None:
    path.rename(outside)
    path.symlink_to(outside)


def dangle(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside)


def pipe_instead(path: Path, outside: Path) -> None:
    """A pipe that nobody writes to: one who opens it waits for ever."""
    path.unlink()
    os.mkfifo(path)


def folder_instead(path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("name", ["index.json", "shard.00000.mds"])
@pytest.mark.parametrize(
    ("replace", "message"),
    [
        (link, "may not be a link"),
        (dangle, "may not be a link"),
        (pipe_instead, "no plain file"),
        (folder_instead, "no plain file"),
    ],
)
def test_what_is_no_plain_file_of_the_folder_is_refused(
    tmp_path: Path, compression: str | None, name: str, replace: Callable[[Path, Path], None], message: str
) -> None:
    foreign(tmp_path / "mds", compression=compression)
    path = tmp_path / "mds" / (name if name == "index.json" or not compression else f"{name}.zstd")
    replace(path, tmp_path / "outside")
    with pytest.raises(DataError, match=message) as caught:
        read_all(tmp_path / "mds")
    assert caught.value.where == str(path)
    if replace is not dangle:
        with pytest.raises(DataError):
            everything(opened(tmp_path, tmp_path / "mds", kind="mds"))


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", "index.json/../x"])
@pytest.mark.parametrize("which", ["raw_data", "zip_data"])
def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str, which: str) -> None:
    index = foreign(tmp_path / "mds", compression="zstd")
    (tmp_path / "outside").write_bytes(SECRET.encode())
    index["shards"][0][which]["basename"] = name
    rewrite(tmp_path / "mds", index)
    with pytest.raises(DataError, match="is not a file of this folder"):
        read_all(tmp_path / "mds")


def test_one_file_is_not_two_shards_nor_both_forms_of_one(tmp_path: Path) -> None:
    index = foreign(tmp_path / "mds", compression="zstd")
    (entry,) = index["shards"]
    for shards in ([entry, entry], [{**entry, "zip_data": entry["raw_data"]}]):
        rewrite(tmp_path / "mds", {**index, "shards": shards})
        with pytest.raises(DataError, match="listed twice"):
            read_all(tmp_path / "mds")


def sizes(*values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda shard: shard.update(column_sizes=list(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda shard: shard.update(samples=2**63), "do not fit"),
        (lambda shard: shard.update(samples=10**30), "do not fit|valid integer"),
        (lambda shard: shard.update(samples=60), "do not fit"),  # their offsets would; they themselves do not
        (sizes(1, 2**33), "less than or equal"),
        (sizes(1, 2**64), "less than or equal"),
        (sizes(1, -(2**63)), "greater than or equal"),
        (sizes(2**31, 2**31), "do not fit"),
        (lambda shard: shard.update(column_names=[], column_encodings=[], column_sizes=[]), "it has no columns"),
        (lambda shard: shard["raw_data"].update(hashes={"shake_128": "00"}), "has no length of its own"),
        (lambda shard: shard["raw_data"].update(hashes={"../sha1": "00"}), "unknown hash"),
        (lambda shard: shard["raw_data"].update(hashes={"sha1": 5}), "valid string"),
        (lambda shard: shard.update(column_encodings=["int8", "pkl"]), "holds pickles, which are never read"),
    ],
)
def test_counts_and_kinds_that_cannot_be_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    index = foreign(tmp_path / "mds")
    change(index["shards"][0])
    rewrite(tmp_path / "mds", index)
    with pytest.raises(DataError, match=message):
        read_all(tmp_path / "mds")


def test_a_pickle_is_never_read_whatever_the_index_calls_it(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    with _mosaic.MDSWriter(columns={"tokens": "pkl"}, out=str(tmp_path / "mds")) as writer:
        writer.write({"tokens": Bomb()})
    with pytest.raises(DataError, match="holds pickles"):
        opened(tmp_path, tmp_path / "mds", kind="mds")
    index = json.loads((tmp_path / "mds/index.json").read_text())
    for encoding in ("pkl:x", "ndarray:O", "ndarray", "bytes"):
        index["shards"][0]["column_encodings"] = [encoding]
        rewrite(tmp_path / "mds", index)
        with pytest.raises(DataError):
            everything(opened(tmp_path, tmp_path / "mds", kind="mds"))
    assert not (tmp_path / "executed").exists()


# --- a bomb -----------------------------------------------------------------------------------------------------------

WINDOW_OF_2_TB = bytes.fromhex("28b52ffd 00 f8 010000")
"""A zstd frame that asks for a window of 2 TB, and then holds nothing."""


def in_a_small_process(code: str, *arguments: str, disk_bytes: int) -> str:
    """What the code prints in a process whose files may not grow beyond ``disk_bytes``; with how many bytes of memory it took
    beyond those of its imports as the last line."""
    program = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from outgrow.errors import OutgrowError\n"
        "from outgrow.streaming.mds import MdsFolder\n"
        "import numpy, zstandard\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({disk_bytes}, {disk_bytes}))\n"
        f"{code}\n"
        "print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


READ = """
try:
    print(MdsFolder(Path(sys.argv[1])).column(0, 'tokens'))
except OutgrowError as error:
    print(type(error).__name__, error)
"""


def gigabyte_of_zeros() -> bytes:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    return b"".join([*(compressor.compress(bytes(2**20)) for _ in range(2**10)), compressor.flush()])


@pytest.mark.parametrize(
    ("make", "message"),
    [(gigabyte_of_zeros, "does not unpack to the"), (lambda: WINDOW_OF_2_TB, "the shard is not a zstd frame")],
    ids=["a gigabyte of zeros", "a window of two terabytes"],
)
def test_a_bomb_takes_no_more_disk_than_the_index_declares_and_little_memory(
    tmp_path: Path, make: Callable[[], bytes], message: str
) -> None:
    bomb = make()
    index = foreign(tmp_path / "mds", compression="zstd")
    (entry,) = index["shards"]
    (tmp_path / "mds" / entry["zip_data"]["basename"]).write_bytes(bomb)
    entry["zip_data"].update(bytes=len(bomb), hashes={})
    entry["raw_data"].update(bytes=3_000_000, hashes={})
    rewrite(tmp_path / "mds", index)
    said, memory = in_a_small_process(READ, str(tmp_path / "mds"), disk_bytes=3_000_000).splitlines()
    assert said.startswith("IntegrityError")
    assert message in said
    assert int(memory) < 64 * 2**20


def test_a_shard_of_a_billion_empty_samples_takes_no_memory(tmp_path: Path) -> None:
    """4 GB on paper: a file without blocks on the disk, whose index declares as many samples as could lie in it."""
    index = foreign(tmp_path / "mds")
    (entry,) = index["shards"]
    samples = (2**32 - 8) // 9
    with open(tmp_path / "mds" / entry["raw_data"]["basename"], "wb") as file:
        file.truncate(2**32)
        file.write(samples.to_bytes(4, "little"))
    entry.update(samples=samples, raw_data={**entry["raw_data"], "bytes": 2**32, "hashes": {}})
    rewrite(tmp_path / "mds", index)
    said, memory = in_a_small_process(READ, str(tmp_path / "mds"), disk_bytes=0).splitlines()
    assert said.startswith("DataError")
    assert "the offsets of the shard contradict its index or its size" in said
    assert int(memory) < 64 * 2**20


def test_a_compressed_source_that_asks_for_two_terabytes_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl.zst").write_bytes(WINDOW_OF_2_TB)
    assert "a.jsonl.zst" in refused(tmp_path, tmp_path / "in", "a window of more than 128 MiB", kind="jsonl")


# --- archives ---------------------------------------------------------------------------------------------------------

KINDS = ("text", "markdown", "jsonl", "json", "parquet", "epub", "fb2", "docx", "pdf", "transcript", "yaml")


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tar file, plain and gzipped, whose members lead out of it."""
    folder = tmp_path_factory.mktemp("tars") / "deep/er"
    folder.mkdir(parents=True)
    for name, mode in (("a.tar", "w:"), ("b.tgz", "w:gz")):
        with tarfile.open(folder / name, mode) as archive:  # type: ignore[call-overload]
            for member in ("../../escaped", "../escaped", str(folder.parent / "escaped"), "plain.txt"):
                info = tarfile.TarInfo(member)
                info.size = len(SECRET)
                archive.addfile(info, io.BytesIO(SECRET.encode()))
            inside = tarfile.TarInfo("link")
            inside.type, inside.linkname = tarfile.SYMTYPE, "/etc"
            archive.addfile(inside)
    return folder


@pytest.mark.parametrize("name", ["a.tar", "b.tgz"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tar_file_is_refused_by_name_as_any_kind_of_source(tmp_path: Path, tars: Path, kind: str, name: str) -> None:
    keys = {"records": "a"} if kind in ("json", "yaml") else {}
    before = sorted(tars.parents[1].rglob("*"))
    for folder, include in ((tars, {"include": [f"**/{name}"]}), (tars / name, {})):
        assert name in refused(tmp_path, folder, f"{name}", kind=kind, **keys, **include)
    assert sorted(tars.parents[1].rglob("*")) == before


def test_a_tar_file_is_no_mds_folder_and_its_owner_is_told_to_unpack_it(
    tmp_path: Path, tars: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="there is no MDS index"):
        opened(tmp_path, tars / "a.tar", kind="mds")
    with pytest.raises(SystemExit):
        main(["data", "detect", str(tars)])
    assert "unpack it" in "".join(capsys.readouterr())


# --- names ------------------------------------------------------------------------------------------------------------

NAMES = [
    "../x", "..", ".", "", "a/b", "/etc", "a b", "a;touch pwned", "$(touch pwned)", "`touch pwned`", "a|b", "a&b", "a\nb",
    "a\n", "\na", "a\0b", "-rf", "~", "*", "a'b", 'a"b', "A", "é", "ａ", "a\u202eb", "a" * 300, "%2e%2e", "${env:HOME}",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_runs_streams_and_tiers_have_plain_names(name: str) -> None:
    recipe = make_recipe(text_stream()).to_dict()
    for change in (
        {"run": {"name": name, "seed": 1}},
        {"data": {**recipe["data"], "streams": [{**recipe["data"]["streams"][0], "name": name}]}},
    ):
        with pytest.raises(ValueError, match="name"):
            type(make_recipe(text_stream())).model_validate({**recipe, **change})
    with pytest.raises(ValueError, match="name"):
        Site.model_validate({"storage": "s", "tiers": [{"name": name, "path": "/fast"}]})


@pytest.mark.parametrize("name", ["../../x", "$(touch pwned)", "; touch pwned", "`touch pwned`", "..", "/etc/passwd"])
def test_a_hostile_name_on_the_command_line_is_refused_and_nothing_is_run_or_made(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(yaml.safe_dump(make_recipe(text_stream()).to_dict()))
    Path("site.yaml").write_text("storage: storage\ncache: cache\n")
    before = sorted(tmp_path.rglob("*"))
    for words in (
        ["recipe", "check", "recipe.yaml", f"run.name={json.dumps(name)}"],
        ["train", "recipe.yaml", f"run.name={json.dumps(name)}"],
        ["data", "build", "recipe.yaml", f"data.streams[0].name={json.dumps(name)}"],
        ["runs", "show", name],
        ["export", name, "out"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2, words
        assert capsys.readouterr().err.startswith(("error: ", "Usage: "))
    assert sorted(tmp_path.rglob("*")) == before


# --- a bucket that someone else writes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("hostile") / "bucket", {"books": (documents(1, 60), documents(2, 5))})


@pytest.fixture
def bucket(dataset: Dataset) -> Iterator[Storage]:
    storage = Storage(f"memory://hostile-{os.urandom(4).hex()}")
    for name in tree_digests(dataset.root):
        storage.upload(dataset.root / name, name)
    yield storage
    fsspec.filesystem("memory").rm(storage.root, recursive=True)


def plant(bucket: Storage, folder: str, name: str, manifest: Any) -> None:
    """A manifest that its marker vouches for: its writer made both."""
    text = manifest if isinstance(manifest, bytes) else json.dumps(manifest).encode()
    bucket.write(f"{folder}/{name}", text)
    bucket.write(f"{folder}/COMMITTED", digest(text).encode())


def fetched(bucket: Storage, dataset: Dataset, cache: Path) -> Path:
    site = Site.model_validate({"storage": bucket.root_url, "cache": str(cache)})
    return local_dataset(site, dataset.card)


@pytest.mark.parametrize(
    "name", ["../evil", "../../../../../../evil", "/evil", "a/../../evil", "a\0b", "", ".", "..", "a\\..\\evil", "a//b", "./a"]
)
def test_a_manifest_that_names_a_file_elsewhere_is_refused_and_nothing_is_written_there(
    bucket: Storage, dataset: Dataset, tmp_path: Path, name: str
) -> None:
    manifest = bucket.read_json("datasets/s/store.json")
    manifest["files"] = {name: digest(SECRET.encode()), **manifest["files"]}
    plant(bucket, "datasets/s", "store.json", manifest)
    bucket.fs.pipe_file(f"{bucket.root}/datasets/evil", SECRET.encode())
    with pytest.raises(DataError, match=r"datasets/s.*: the manifest names a file outside its folder"):
        fetched(bucket, dataset, tmp_path / "in/cache")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET in path.read_text(errors="replace")]


@pytest.mark.parametrize(
    "manifest",
    [b"", b"[]", b"[" * 100_000, b"\xff", b"5", b"{}", b'{"files": []}', b'{"files": {"a": 5}}', b'{"files": {"a": null}}'],
    ids=lambda text: ascii(text[:30]),
)
def test_what_is_no_manifest_is_refused(bucket: Storage, dataset: Dataset, tmp_path: Path, manifest: bytes) -> None:
    for folder, name in ((dataset.card.store, "store.json"), (dataset.card.indexes[0].folder, "index.json")):
        plant(bucket, folder, name, manifest)
        with pytest.raises(IntegrityError, match="the manifest has no digests under 'files'"):
            fetched(bucket, dataset, tmp_path / "cache")


def test_an_index_manifest_without_its_facts_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    for manifest in ({"files": {}}, {**json.loads((dataset.index / "index.json").read_text()), "train": [{"name": 5}]}):
        text = json.dumps(manifest).encode()
        (tmp_path / "index.json").write_bytes(text)
        (tmp_path / "COMMITTED").write_text(digest(text))
        with pytest.raises(IntegrityError, match="this is no manifest of a row index"):
            RowIndex.open(tmp_path)


def arrays(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], bytes]:
    def changed(path: Path) -> bytes:
        found = load_file(path)
        change(found)
        return save(found)

    return changed


@pytest.mark.parametrize(
    "data",
    [
        lambda path: b"",
        lambda path: b"\xff" * 64,
        lambda path: (2**62).to_bytes(8, "little") + b"{}",
        arrays(lambda found: found.pop("digest")),
        arrays(lambda found: found.update(extra=np.zeros(1))),
        arrays(lambda found: found.update(samples=found["samples"].astype(np.int64))),
        arrays(lambda found: found.update(samples=np.zeros((), np.int32))),
        arrays(lambda found: found.update(samples=-found["samples"])),
        arrays(lambda found: found.update(samples=np.full_like(found["samples"], 2**31 - 1))),
        arrays(lambda found: found.update(raw_bytes=found["raw_bytes"][:-1])),
        arrays(lambda found: found.update(raw_bytes=np.zeros_like(found["raw_bytes"]))),
        arrays(lambda found: found.update(raw_bytes=np.full_like(found["raw_bytes"], 2**62))),
        arrays(lambda found: found.update(zip_bytes=-np.ones_like(found["zip_bytes"]))),
        arrays(lambda found: found.update(zip_bytes=np.full_like(found["zip_bytes"], 2**40))),
        arrays(lambda found: found.update(digest=found["digest"][:, :16].copy())),
    ],
)
def test_a_table_of_shards_that_cannot_be_is_refused(tmp_path: Path, data: Callable[[Path], bytes]) -> None:
    table = ShardTable(
        samples=np.array([2, 3], np.int32),
        raw_bytes=np.array([100, 200]),
        zip_bytes=np.array([0, 0]),
        digest=np.zeros((2, 32), np.uint8),
    )
    table.save(tmp_path)
    (tmp_path / SHARDS).write_bytes(data(tmp_path / SHARDS))
    with pytest.raises(DataError, match="this is no table of shards") as caught:
        MdsFolder(tmp_path, file_digest(tmp_path / SHARDS))
    assert caught.value.where == str(tmp_path / SHARDS)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[" * 10_000, "recursion limit|expected|EOF"),
        (b"{}", "column_names: Field required"),
        (b"[]", "valid dictionary|object"),
        (b"\xff", "header"),
        (b'{"column_names": ["tokens"], "column_encodings": ["pkl"], "column_sizes": [null]}', "holds pickles"),
        (b'{"column_names": ["tokens"], "column_encodings": ["bytes"], "column_sizes": [-8]}', "greater than or equal"),
        (b'{"column_names": ["tokens"], "column_encodings": ["bytes"], "column_sizes": ["8"]}', "valid integer"),
        (b'{"column_names": ["t", "t"], "column_encodings": ["bytes"], "column_sizes": [8]}', "do not match"),
    ],
)
def test_a_header_of_a_shard_that_tells_no_columns_is_refused(tmp_path: Path, header: bytes, message: str) -> None:
    first = 4 * 3 + len(header)
    shard = np.array([1, first, first + 8], "<u4").tobytes() + header + bytes(8)
    (tmp_path / "shard.00000.mds").write_bytes(shard)
    ShardTable(
        samples=np.array([1], np.int32),
        raw_bytes=np.array([len(shard)]),
        zip_bytes=np.array([0]),
        digest=np.frombuffer(bytes.fromhex(digest(shard)), np.uint8).reshape(1, 32),
    ).save(tmp_path)
    folder = MdsFolder(tmp_path, file_digest(tmp_path / SHARDS))
    with pytest.raises(DataError, match=f"does not tell its columns: .*({message})|{message}"):
        folder.column(0, "tokens")


@pytest.mark.parametrize("store", ["../evil", "/evil", "datasets/../../evil", "", "datasets/\0"])
def test_a_card_of_folders_elsewhere_is_refused(bucket: Storage, dataset: Dataset, store: str) -> None:
    key = section_key(dataset.recipe())
    card = dataset.card.to_dict()
    for planted in (
        {**card, "store": store},
        {**card, "indexes": [{**card["indexes"][0], "folder": store}]},
        {**card, "indexes": [{**card["indexes"][0], "folder": "datasets/other"}]},
    ):
        bucket.write_json(key, planted)
        with pytest.raises(IntegrityError, match="the card names folders that are none of a dataset"):
            remembered(bucket, key)
    for text in (b"", b"[]", b"5", b"{}", b'{"store": "a"}', b"[" * 100_000):
        bucket.write(key, text)
        with pytest.raises(IntegrityError, match="this is no card of a dataset"):
            remembered(bucket, key)
