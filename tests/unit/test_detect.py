"""Detection: what is proposed for a folder of everything, that a recipe takes it, and that its streams read just that."""

from __future__ import annotations

import gzip
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from read_files import FILES
from text_recipes import make_site

from outgrow.errors import DataError
from outgrow.recipes.loading import load
from outgrow.recipes.schema import Recipe
from outgrow.streaming import detect as module
from outgrow.streaming.detect import Detection, detect, render
from outgrow.streaming.detection.patterns import patterns
from outgrow.streaming.detection.records import guess, list_within
from outgrow.streaming.detection.signs import clean_steps
from outgrow.streaming.detection.whole_looks import likely_russian
from outgrow.streaming.sources import Document, Dropped, open_source
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.files import find_files

HEAD = """\
schema: 1
run: {name: test, seed: 1}
model: {kind: architecture, family: llama}
batch: {rows: 4}
duration: {tokens: 1000}
optimizer: {learning_rate: 0.001}
data:
  sequence_length: 16
  tokenizer: {kind: train, vocab_size: 300}
"""
MESSAGES = {"messages": [{"role": "user", "content": "Где берег?"}, {"role": "bot", "content": "Там."}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
ALPACA = {"instruction": "Sum", "input": "1 2", "output": "3"}
PAIR = {"question": "Why?", "chosen": "So.", "rejected": "No."}
SCENE = "speaker: Анна\nintent: ask\nphase: start\nlines:\n- Где берег?\n"


def write(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def jsonl(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def streams(detection: Detection) -> dict[str, dict[str, Any]]:
    """What is rendered, as YAML has it, by name."""
    proposed = yaml.safe_load(render(detection))["streams"]
    assert len({stream["name"] for stream in proposed}) == len(proposed)
    return {stream["name"]: stream for stream in proposed}


def recipe_of(tmp_path: Path, detection: Detection) -> Recipe:
    """A recipe that holds what is rendered."""
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD + textwrap.indent(render(detection), "  "))
    return load(path)


def read_all(tmp_path: Path, detection: Detection) -> dict[str, list[Document | Dropped]]:
    """What the streams of such a recipe read."""
    site = make_site(tmp_path, **dict(detection.places))
    found = {}
    for stream in recipe_of(tmp_path, detection).data.streams:
        source = open_source(stream, site, DigestCache(tmp_path / "cache"))
        found[stream.name] = [document for unit in source.units() for document in unit.documents()]
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two kinds of almost everything, some of it broken."""
    root = tmp_path / "My Corpus"
    for kind in ("epub", "fb2", "docx", "pdf", "srt", "vtt"):
        for path in FILES.glob(f"*.{kind}"):
            (root / "library").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / "library")
    for name in ("whisper.json", "whisperx.json"):
        shutil.copy(FILES / name, write(root / "talks" / name, ""))
    write(root / "chats" / "a.jsonl", jsonl(*[MESSAGES] * 20, {"messages": "no"}) + "{broken\n")
    write(root / "chats" / "b.jsonl.gz", gzip.compress(jsonl(*[MESSAGES] * 3).encode()))
    write(root / "share.json", json.dumps([SHAREGPT] * 4))
    write(root / "deep.json", json.dumps({"version": 1, "data": {"rows": [ALPACA] * 5, "few": [ALPACA]}}))
    write(root / "pairs" / "p.jsonl", jsonl(*[PAIR] * 3))
    write(root / "web.jsonl", jsonl({"text": "words", "url": "x"}, {"text": "more words"}))
    pq.write_table(pa.table({"body": ["long text"] * 3, "n": [1, 2, 3], "raw": [b"\xff"] * 3}), write(root / "t.parquet", ""))
    for number in range(3):
        write(root / "scenes" / f"{number}.yaml", SCENE)
    write(root / "notes" / "a.md", "---\ntitle: x\n---\n# Words\n")
    write(root / "a.txt", "Words.\n")
    write(root / "b.txt", "More words.\n")
    write(root / "package.json", '{"name": "x", "version": 2}')
    write(root / "old.doc", b"\xd0\xcf\x11\xe0")
    write(root / "scan.djvu", b"AT&TFORM\0")
    write(root / "README", "Read me.\n")
    write(root / "data.log", "Log.\n")
    write(root / "tokens" / "index.json", json.dumps({"version": 2, "shards": [{"format": "mds", "column_names": ["tokens"]}]}))
    write(root / "tokens" / "shard.00000.mds", b"\0" * 10)
    return root


def test_a_folder_of_everything(corpus: Path) -> None:
    detection = detect(corpus)
    found = streams(detection)
    kinds = {name: (stream["source"]["kind"], stream["source"].get("include")) for name, stream in found.items()}
    assert kinds == {
        "chats": ("jsonl", ["chats/**/*.jsonl", "**/*.jsonl.gz"]),
        "pairs": ("jsonl", ["pairs/**/*.jsonl"]),
        "texts-3": ("jsonl", ["web.jsonl"]),
        "dialogues": ("json", ["share.json"]),
        "questions": ("json", ["deep.json"]),
        "texts-2": ("parquet", None),
        "texts": ("text", ["**/*.txt"]),
        "notes": ("markdown", None),
        "epub-books": ("epub", None),
        "fb2-books": ("fb2", None),
        "documents": ("docx", None),
        "pdf": ("pdf", None),
        "transcripts": ("transcript", ["talks/**/*.json", "**/*.srt", "**/*.vtt"]),
        "scenes": ("yaml", None),
        "tokens": ("mds", None),
    }
    assert {stream["source"]["path"] for name, stream in found.items() if name != "tokens"} == {"my-corpus"}
    assert found["chats"]["source"]["shape"] == {"kind": "messages"}
    assert found["dialogues"]["source"]["shape"] == {"kind": "sharegpt"}
    assert found["questions"]["source"]["records"] == "data.rows"
    assert found["pairs"]["source"]["shape"] == {"kind": "preference", "prompt": "question"}
    assert found["texts-3"]["source"]["shape"] == {"kind": "text"}
    assert found["texts-2"]["source"]["shape"] == {"kind": "text", "field": "body"}
    for name in ("chats", "dialogues", "questions"):
        assert (found[name]["split"], found[name]["too_long"]) == ("never", "split")
    assert (found["pairs"]["split"], found["pairs"]["too_long"]) == ("never", "stop")
    assert (found["scenes"]["tag"], found["scenes"]["source"]["keep"]) == ("<YAML>", ["speaker", "intent", "phase"])
    assert found["transcripts"]["tag"] == "<TRANSCRIPT>"
    assert found["pdf"]["clean"] == ["nfc", "control_characters", "hyphenation", "line_joins"]
    assert {name for name, stream in found.items() if "on_error" in stream["source"]} == {"chats", "pdf"}
    assert dict(detection.unknown).keys() == {"package.json", "old.doc", "scan.djvu", "README", "data.log"}
    assert detection.places == (("my-corpus", corpus), ("tokens", corpus / "tokens"))


def test_why_stands_beside_what_is_proposed(corpus: Path) -> None:
    text = render(detect(corpus))
    for why in (
        "# This belongs under data: in the recipe",
        f"#     my-corpus: {corpus}",
        "# 2 files: .jsonl, .jsonl.gz",
        "# 23 of 25 records looked at are lists of messages with role and content",
        "# 2 of 25 records looked at do not fit; the first: chats/a.jsonl#21: messages: it is not JSON",
        "# 1 of 4 files are scans without text, counted as empty; the first: library/scan.pdf",
        "# 1 file cannot be read; the first: library/encrypted.pdf: it is encrypted",
        "# a dialogue lies whole in one row",
        "# short values that most of 3 scenes have",
        "# 1 of 1 files begin with front matter",
        "# Not understood, and read by no stream: 5 files",
        "#   old.doc: .doc is not read: save it as .docx",
        "#   data.log: it looks like text: a stream of kind text with include: ['**/*.log'] reads it",
        "#   package.json: it holds neither records",
    ):
        assert why in text
    assert max(map(len, text.splitlines())) <= 128 + 120


def test_a_recipe_takes_it_and_its_streams_read_all_of_it_once(corpus: Path, tmp_path: Path) -> None:
    shutil.rmtree(corpus / "tokens")  # shards of nothing cannot be opened
    detection = detect(corpus)
    found = read_all(tmp_path, detection)
    files = [item.source.partition("#")[0] for items in found.values() for item in items]
    unknown = {name for name, _ in detection.unknown}
    everything = {file.name for file in find_files("s", str(corpus), ("**/*",), ()).files}
    assert set(files) == everything - unknown
    owners = {(file, name) for name, items in found.items() for file in {item.source.partition("#")[0] for item in items}}
    assert len(owners) == len(everything) - len(unknown)
    dropped = [(item.source, item.reason) for items in found.values() for item in items if isinstance(item, Dropped)]
    assert sorted(dropped) == [
        ("chats/a.jsonl#21", "malformed"),
        ("chats/a.jsonl#22", "malformed"),
        ("library/encrypted.pdf", "malformed"),
        ("library/scan.pdf", "empty"),
    ]


def test_token_shards_are_a_stream_of_their_own(corpus: Path, tmp_path: Path) -> None:
    stream = recipe_of(tmp_path, detect(corpus)).data.streams[-1]
    assert (stream.name, stream.source.kind) == ("tokens", "mds")
    (alone,) = recipe_of(tmp_path, detect(corpus / "tokens")).data.streams
    assert (alone.name, alone.source.kind) == ("tokens", "mds")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("book.epub", "epub"), ("whisperx.json", "transcript"), ("book.fb2.zip", "fb2"), ("srt.srt", "transcript")],
)
def test_a_single_file(tmp_path: Path, name: str, kind: str) -> None:
    detection = detect(FILES / name)
    (stream,) = recipe_of(tmp_path, detection).data.streams
    assert stream.source.kind == kind
    assert "include" not in render(detection)
    ((_, place),) = detection.places
    assert place == FILES / name
    ((document,),) = read_all(tmp_path, detection).values()
    assert isinstance(document, Document)


def test_scenes_in_a_list_and_a_file_that_is_broken(tmp_path: Path) -> None:
    items = [{"speaker": "А", "intent": "ask", "text": "слово " * 20}] * 5
    write(tmp_path / "in" / "a.yaml", yaml.safe_dump({"scenes": items}, allow_unicode=True))
    write(tmp_path / "in" / "b.yaml", yaml.safe_dump({"scenes": items}, allow_unicode=True))
    write(tmp_path / "in" / "c.yaml", "a: [\n")
    detection = detect(tmp_path / "in")
    (stream,) = streams(detection).values()
    assert (stream["source"]["records"], stream["source"]["keep"]) == ("scenes", ["intent", "speaker"])
    assert stream["source"]["on_error"] == "quarantine"
    assert "1 file cannot be read; the first: c.yaml: line 2: not valid YAML" in render(detection)
    (found,) = read_all(tmp_path, detection).values()
    assert [isinstance(item, Document) for item in found] == [True] * 10 + [False]


def test_an_encoding_is_proposed_where_some_files_leave_doubt(tmp_path: Path) -> None:
    russian = (
        "Утром над рекой стоял туман, густой, как молоко. Лодка шла медленно, и никто не говорил ни слова. Потом лоцман поднял "
        "руку и сказал, чтобы гребцы остановились: впереди показался берег, которого не было ни на одной карте.\n"
    )
    for number in range(3):
        write(tmp_path / "in" / f"{number}.txt", (russian * 5).encode("cp1251"))
    write(tmp_path / "in" / "short.txt", "Да, берег там.\n".encode("cp1251"))
    detection = detect(tmp_path / "in")
    (stream,) = streams(detection).values()
    assert stream["source"]["encoding"] == "cp1251"
    assert " of 4 files leave doubt, but seem to be in it; check that" in render(detection)
    (found,) = read_all(tmp_path, detection).values()
    assert [item.content for item in found if isinstance(item, Document)] == [russian * 5] * 3 + ["Да, берег там.\n"]
    write(tmp_path / "in" / "utf8.txt", russian)
    (stream,) = streams(detect(tmp_path / "in")).values()
    assert "encoding" not in stream["source"]
    assert stream["source"]["on_error"] == "quarantine"


@pytest.mark.parametrize("encoding", ["cp1251", "koi8-r", "cp866", "iso8859-5"])
def test_old_russian_encodings_are_told_apart(encoding: str) -> None:
    assert likely_russian("Утром над рекой стоял туман, густой, как молоко.".encode(encoding)) == encoding
    assert likely_russian("Le café était déjà fermé, quel dommage.".encode("cp1252")) == ""
    assert likely_russian(b"") == ""


def test_not_every_file_is_looked_at_and_each_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOOKS_A_SUFFIX", 10)
    for number in range(40):
        write(tmp_path / "in" / f"talk{number % 2}" / f"{number:02}.jsonl", jsonl(MESSAGES if number % 2 else {"text": "a"}))
    detection = detect(tmp_path / "in")
    assert (detection.num_files, detection.num_looks) == (40, 10)
    assert "40 files in" in render(detection) and "10 of them looked at" in render(detection)
    found = streams(detection)
    assert {name: stream["source"]["include"] for name, stream in found.items()} == {
        "talk0": ["talk0/**/*.jsonl"],
        "talk1": ["talk1/**/*.jsonl"],
    }
    assert [len(items) for items in read_all(tmp_path, detection).values()] == [20, 20]


def test_looks_are_spread_over_many_suffixes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_LOOKS", 20)
    for number in range(100):
        write(tmp_path / "in" / f"a.x{number}", "x")
    for number in range(50):
        write(tmp_path / "in" / f"{number}.txt", "words\n")
    detection = detect(tmp_path / "in")
    assert detection.num_looks <= 20
    (stream,) = recipe_of(tmp_path, detection).data.streams
    assert stream.source.kind == "text"


def test_nothing_to_read_is_said(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.bin", b"\0\1")
    text = render(detect(tmp_path / "in"))
    assert "streams: []" in text and "#   a.bin: no text of a kind that is read" in text
    (tmp_path / "none" / "below").mkdir(parents=True)
    for path, message in (
        (tmp_path / "none", "the folder holds no file"),
        (tmp_path / "gone", "there is no such file or folder"),
    ):
        with pytest.raises(DataError, match=message):
            detect(path)
    (tmp_path / "none" / "book.txt").symlink_to(tmp_path / "gone.txt")
    assert "#   book.txt: a link that leads to no file" in render(detect(tmp_path / "none"))


def test_parquet_is_looked_at_as_it_is_read(tmp_path: Path) -> None:
    times = pa.array([1, 10**9 + 1], pa.timestamp("ns"))  # Python has no nanoseconds
    pictures = pa.array([b"\xff" * 9] * 2, pa.binary_view())
    pq.write_table(pa.table({"text": ["a", "b"], "time": times, "picture": pictures}), tmp_path / "a.parquet")
    (stream,) = streams(detect(tmp_path)).values()
    assert stream["source"]["shape"] == {"kind": "text"}
    pq.write_table(pa.table({"time": times, "picture": pictures}), tmp_path / "a.parquet")
    assert "a.parquet: no column of it is known; columns: time\n" in render(detect(tmp_path))


def test_hostile_names_and_contents_stay_in_their_comments(tmp_path: Path) -> None:
    for name in ("a\nstreams: []\n.epub", "b#: [x].epub", "'\".epub", "e\u2028.epub", "[!*?].txt"):
        write(tmp_path / "in" / name, "<no/>")
    write(tmp_path / "in" / "odd\n- key.jsonl", jsonl({"messages": [{"role": "x\n  - y", "content": "a"}]}) * 3)
    (tmp_path / "in" / "c.jsonl").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "in" / "deep.json", "[" * 100_000)
    write(tmp_path / "in" / "bomb.yaml", "[" * 100_000)
    write(tmp_path / "in" / "empty.txt", "")
    detection = detect(tmp_path / "in")
    names = {stream.source.kind for stream in recipe_of(tmp_path, detection).data.streams}
    assert {"epub", "text", "yaml"} <= names
    assert all(line.isprintable() for line in render(detection).splitlines())


# --- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (MESSAGES, "messages"),
        (MESSAGES["messages"], "messages"),
        ({"dialogue": [{"role": "user", "content": "a"}]}, "messages"),
        (SHAREGPT, "sharegpt"),
        (SHAREGPT["conversations"], "sharegpt"),
        (ALPACA, "alpaca"),
        ({"question": "a", "answer": "b", "id": 1}, "alpaca"),
        (PAIR, "preference"),
        ({"chosen": MESSAGES["messages"], "rejected": []}, "preference"),
        ({"text": "a", "meta": {}}, "text"),
        ({"story": "a" * 200}, "text"),
        ({"story": "a"}, None),
        ("a", None),
        ([], None),
        ({"messages": []}, None),
    ],
)
def test_shapes_are_guessed(record: Any, kind: str | None) -> None:
    shape = guess(record)
    assert (None if shape is None else shape.kind) == kind


def test_the_longest_list_within_is_found() -> None:
    value = {"a": [{}], "b": {"c": [{}, {}], "d": [1, 2, 3]}, "e.f": [{}] * 9, "g": {"h": {"i": {"j": [{}] * 9}}}}
    assert list_within(value) == ("b.c", [{}, {}])
    assert list_within([1]) == ("", [])


@pytest.mark.parametrize(
    ("kind", "text", "steps"),
    [
        ("text", "Plain words,\nand more of them.\n", []),
        ("text", "й".replace("й", "и\u0306"), ["nfc"]),
        ("text", "a\u200bb\n", ["control_characters"]),
        ("text", "широ-\nкая\nрека и бе-\nрег и да-\nль моря и\nдальше\nещё\n", ["hyphenation", "line_joins"]),
        ("text", "мoре рeка cон\n", ["look_alikes"]),
        ("epub", "широ-\nкая бе-\nрег да-\nль", ["hyphenation"]),
        ("transcript", "[00:01] э, да\nну, uh, нет", ["time_codes", "filler_words"]),
        ("text", "[00:01] э, да\nну, uh, нет", []),
        ("transcript", "это эхо, at 5:00 мы", []),
        ("pdf", "x", ["nfc", "control_characters", "hyphenation", "line_joins"]),
    ],
)
def test_cleaning_is_proposed_by_signs(kind: str, text: str, steps: list[str]) -> None:
    assert [step for step, _ in clean_steps(kind, [text])] == steps


def test_patterns_match_the_chosen_alone(tmp_path: Path) -> None:
    names = [
        f"{folder}{name}{suffix}" for folder in ("", "a/", "a/b/", "c[1]/") for name in "xyz" for suffix in (".json", ".txt")
    ]
    for name in names:
        write(tmp_path / name, "x")
    cases = (names, names[::2], names[:1], names[1::3], [n for n in names if n.startswith(("a/", "c"))], names[3:])
    for chosen in cases:
        include, exclude = patterns(chosen, names)
        found = find_files("s", str(tmp_path), include, exclude).files
        assert sorted(file.name for file in found) == sorted(chosen)


def test_many_files_of_one_kind_with_a_few_of_another_are_said_in_short() -> None:
    names = [f"{number}.json" for number in range(100)]
    assert patterns(names[2:], names) == (("**/*.json",), ("0.json", "1.json"))
