"""JSON lines, plain and compressed: lines come once each, what does not fit is named, and memory is bounded."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard
from opened_sources import dropped, everything, kept, opened, refused, texts

from outgrow.errors import DataError
from outgrow.streaming.sources import Document, Dropped
from outgrow.streaming.sources.lines import line_blocks


def compressed(name: str, data: bytes) -> bytes:
    name = name.lower()
    if name.endswith(".gz"):
        return gzip.compress(data[:1000], mtime=0) + gzip.compress(data[1000:], mtime=0)
    if name.endswith(".zst"):
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
        return compress(data[:1000]) + compress(b"") + compress(data[1000:])
    return data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Many units from little text."""
    for module in ("lines", "reading"):
        monkeypatch.setattr(f"outgrow.streaming.sources.{module}.UNIT_BYTES", 500)
    monkeypatch.setattr("outgrow.streaming.sources.lines._READ_BYTES", 64)
    yield


# --- lines ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "A.JSONL.GZ", "A.JSONL.ZST"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_lines_come_once_each_in_order_with_their_numbers(folder: Path, name: str, end: str) -> None:
    values = [{"text": f"line {i} " + "x" * (i * 7 % 90), "id": i} for i in range(200)]
    values[50]["text"] = "long " * 700
    data = "\n".join(json.dumps(value) for value in values) + end
    (folder / name).write_bytes(compressed(name, data.encode()))
    source = opened(folder.parent, folder, kind="jsonl", include=("*",))
    assert everything(source) == [
        Document(content=str(value["text"]), source=f"{name}#{i}", meta={"id": value["id"]})
        for i, value in enumerate(values, 1)
    ]
    units = list(source.units())
    assert len(units) > 5
    assert sum(unit.num_bytes for unit in units) == len(data) == source.inputs[0].text_bytes


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_that_is_too_long_is_left_out_alone(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever it stands in the file, and in a file of nothing else."""
    for module in ("lines", "json_records", "reading"):
        monkeypatch.setattr(f"outgrow.streaming.sources.{module}.MAX_DOCUMENT_BYTES", 2000)
    monkeypatch.setattr("outgrow.streaming.sources.lines._SHOWN_BYTES", 70)
    long = '{"text": "' + "long " * 600 + '"}'
    short = [f'{{"text": "line {i}"}}' for i in range(60)]
    for lines in ([long], [long, *short], [*short[:31], long, *short[31:]], [*short, long], [long, long]):
        for end in ("", "\n"):
            (folder / name).write_bytes(compressed(name, ("\n".join(lines) + end).encode()))
            numbers = [number for number, line in enumerate(lines, 1) if line is long]
            refused(folder.parent, folder, rf"{name}:{numbers[0]}: the record has 3,01\d bytes; at most 2,000", kind="jsonl")
            source = opened(folder.parent, folder, kind="jsonl", on_error="quarantine")
            assert texts(source) == [json.loads(line)["text"] for line in lines if line is not long]
            assert dropped(source) == [(f"{name}#{number}", "malformed") for number in numbers]
            contents = {item.content for item in everything(source) if isinstance(item, Dropped)}
            assert contents == {long[:70]}
            assert sum(unit.num_bytes for unit in source.units()) == source.inputs[0].text_bytes


def test_small_files_share_a_unit(folder: Path) -> None:
    for number in range(20):
        (folder / f"{number:02}.jsonl").write_text(f'{{"text": "{number}"}}\n')
    source = opened(folder.parent, folder, kind="jsonl")
    assert len(list(source.units())) == 1
    assert texts(source) == [str(number) for number in range(20)]


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not JSON: Expecting .* at column 13"),
        (b"[1]", "a JSON object is needed, not a list"),
        (b"null", "a JSON object is needed, not null"),
        (b'{"txt": "a", "id": 3}', "no key 'text'; its keys: txt, id"),
        (b"{}", "no key 'text'; its keys: none"),
        (b'{"text": 3}', "text is a number; a text is needed"),
        (b'{"text": true}', "text is true or false; a text is needed"),
        (b'{"text": ["a"]}', "text is a list; a text is needed"),
        (b'{"text": "\xff"}', "byte 10 is not UTF-8"),
        (b'{"text": "\xed\xa0\x80"}', "byte 10 is not UTF-8"),
        (b'\xff\xfe{\0"\0t\0"\0', "not UTF-8; it begins like UTF-16"),
        (b'{"text": "\\ud800"}', "surrogate"),
        (b'{"text": "a", "m": "\\uDC00"}', "surrogate"),
        (b'{"text": "a", "\\ud800": 1}', "surrogate"),
        (b'{"text": "a", "m": NaN}', "NaN is not JSON"),
        (b'{"text": "a", "m": [-Infinity]}', "-Infinity is not JSON"),
        (b'{"text": "a", "m": 1e999}', "1e999 is too large"),
        (b'{"text": "a", "m": ' + b"1" * 5000 + b"}", "cannot be read|limit"),
        (b'{"text": "a", "text": "b"}', "the key 'text' comes twice"),
        (b'{"text": "a", "m": {"k": 1, "k": 1}}', "the key 'k' comes twice"),
        (b'{"text": "a"} {"text": "b"}', "not JSON: Extra data"),
        (b"[" * 100_000, "nested too deeply; at most 100"),
        (b'{"text": "a", "m": ' + b'{"a":[' * 50 + b"]}" * 50 + b"}", "nested too deeply; at most 100"),
    ],
)
def test_a_bad_line_is_named_or_left_out(folder: Path, line: bytes, reason: str) -> None:
    (folder / "b.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "\\ud83d\\ude00"}\n')
    message = refused(folder.parent, folder, rf"b\.jsonl:3: .*({reason})", kind="jsonl")
    assert "set on_error: skip or quarantine" in message
    for on_error in ("skip", "quarantine"):
        found = everything(opened(folder.parent, folder, kind="jsonl", on_error=on_error))
        assert [item.source for item in found] == [f"b.jsonl#{number}" for number in (1, 2, 3, 4)]
        empty, bad = found[1:3]
        assert isinstance(empty, Dropped) and empty.reason == "empty"
        assert isinstance(bad, Dropped) and bad.reason == "malformed" and bad.detail in message
        assert bad.content == (line.decode(errors="replace")[: 64 * 1024] if on_error == "quarantine" else "")
        assert found[3] == Document(content="\U0001f600", source="b.jsonl#4")


def test_a_key_that_comes_twice_among_many_is_found_in_good_time(folder: Path) -> None:
    keys = [f'"k{i}": 1' for i in range(200_000)]
    (folder / "a.jsonl").write_text("{" + ", ".join([*keys, keys[-1]]) + "}")
    refused(folder.parent, folder, "the key 'k199999' comes twice", kind="jsonl")  # minutes where each is looked for among all


def test_what_is_deep_or_odd_and_fits_is_kept(folder: Path) -> None:
    deep = '{"text": "a", "m": ' + '{"a":[' * 49 + "]}" * 49 + "}"
    flat = json.dumps({"text": "b", "m": [[] for _ in range(500)]})
    (folder / "a.jsonl").write_text(
        f'\ufeff{deep}\n{flat}\n{{"text": "c\\u0000\\\\ud800", "n": 1e5, "i": -12345678901234567890}}'
    )
    first, second, third = kept(opened(folder.parent, folder, kind="jsonl"))
    assert first.meta == {"m": json.loads(deep)["m"]}
    assert len(second.meta["m"]) == 500
    assert (third.content, third.meta) == ("c\0\\ud800", {"n": 1e5, "i": -12345678901234567890})


@pytest.mark.parametrize("text", ["null", '""', '" \\n"'])
def test_a_record_without_text_is_counted_and_stops_nothing(folder: Path, text: str) -> None:
    (folder / "a.jsonl").write_text(f'{{"text": {text}}}\n')
    assert dropped(opened(folder.parent, folder, kind="jsonl")) == [("a.jsonl#1", "empty")]


def test_another_field_is_the_text(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"body": "x", "text": "y"}\n')
    (only,) = kept(opened(folder.parent, folder, kind="jsonl", shape={"kind": "text", "field": "body"}))
    assert only == Document(content="x", source="a.jsonl#1", meta={"text": "y"})


# --- compression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_of_a_damaged_compressed_file_nothing_is_used(folder: Path, name: str, damage: str) -> None:
    """Before anything is built; the checksum at the end of a file does not tell which line is wrong."""
    lines = [json.dumps({"text": os.urandom(400).hex()}) for _ in range(400)]
    data = bytearray(compressed(name, "\n".join(lines).encode()))
    if damage == "cut":
        del data[-2000:]
    else:
        data[len(data) // 2 : len(data) // 2 + 2] = bytes(2)
    (folder / name).write_bytes(data)
    (folder / "fine.jsonl").write_text('{"text": "fine"}')
    with pytest.raises(DataError, match=rf"{name}: the compressed file is damaged: .*; none of it is used"):
        opened(folder.parent, folder, kind="jsonl").inputs  # noqa: B018  (a property that reads)
    source = opened(folder.parent, folder, kind="jsonl", on_error="skip")
    assert source.inputs[0].text_bytes == len(data)  # not known: its size on the disk stands for it
    assert dropped(source) == [(name, "malformed")]
    assert texts(source) == ["fine"]
    with pytest.raises(DataError, match=rf"{name}(:\d+)?: "):  # what was measured under skip does not let it pass
        everything(opened(folder.parent, folder, kind="jsonl"))


def test_a_zstd_window_above_the_limit_is_told_from_damage(folder: Path) -> None:
    choices = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=choices).compressobj()
    (folder / "a.jsonl.zst").write_bytes(compressor.compress(b'{"text": "a"}') + compressor.flush())
    refused(folder.parent, folder, "window of more than 128 MiB.*--long", kind="jsonl")


@pytest.mark.parametrize(("name", "num_bytes"), [("bomb.jsonl.zst", 400_000_000), ("bomb.jsonl.gz", 100_000_000)])
def test_a_bomb_is_left_out_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, num_bytes: int
) -> None:
    import tracemalloc

    bomb = tmp_path / name
    zeros = bytes(num_bytes)
    bomb.write_bytes(zstandard.ZstdCompressor().compress(zeros) if name.endswith("zst") else gzip.compress(zeros, 1))
    del zeros
    assert bomb.stat().st_size < 1_000_000
    monkeypatch.setattr("outgrow.streaming.sources.lines.MAX_DOCUMENT_BYTES", 10_000_000)
    tracemalloc.start()
    (block,) = line_blocks(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert block.too_long and block.num_bytes == num_bytes and block.data is not None and len(block.data) <= 65536
    assert peak < 80_000_000


@pytest.mark.parametrize(("megabytes", "fits"), [(200, True), (300, False)])
def test_a_line_of_hundreds_of_megabytes_takes_bounded_memory(folder: Path, megabytes: int, fits: bool) -> None:
    """Line 2 of a plain file; its characters are Latin. Memory is measured in a process of its own."""
    with open(folder / "long.jsonl", "wb") as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(megabytes):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n{"text": "b"}\n')
    script = """
import resource, sys
from pathlib import Path
from opened_sources import everything, opened
folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = opened(folder.parent, folder, kind="jsonl", on_error="skip")
print(*(type(item).__name__ for item in everything(source)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True, env=environment
    )
    *kinds, grown = done.stdout.split()
    assert kinds == ["Document", "Document" if fits else "Dropped", "Document"]
    assert int(grown) < (3.5 * megabytes if fits else 50)
