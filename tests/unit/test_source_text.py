"""Text and Markdown files: what is found, decoded, refused and left out."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from opened_sources import dropped, everything, kept, opened, refused, texts

from outgrow.errors import DataError
from outgrow.streaming.sources import Document, Dropped

RUSSIAN = (
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Москва - столица России; "
    "население города составляет более двенадцати миллионов человек.\n"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    return tmp_path / "a"


# --- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1251", "koi8-r", "cp866", "iso8859-5"])
@pytest.mark.parametrize("kind", ["text", "markdown"])
def test_russian_text_is_decoded_whatever_its_encoding(folder: Path, encoding: str, kind: str) -> None:
    (folder / "ru.md").write_bytes((RUSSIAN * 10).encode(encoding))
    assert texts(opened(folder.parent, folder, kind=kind)) == [RUSSIAN * 10]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("Привет".encode("koi8-r"), "in doubt"),
        ("Le café était déjà fermé, quel dommage. ".encode("cp1252") * 5, "in doubt"),
        (RUSSIAN.encode("utf-16-le"), "zero bytes"),
        (b"\xff\xfea", "utf-16"),
        (bytes(range(128, 256)) * 20, "in doubt|no encoding"),
    ],
)
def test_text_in_doubt_is_refused_by_name_or_left_out(folder: Path, data: bytes, reason: str) -> None:
    (folder / "odd.txt").write_bytes(data)
    message = refused(folder.parent, folder, f"odd.txt: it cannot be read as text: .*({reason})", kind="text")
    assert "set the source's encoding" in message
    (skipped,) = everything(opened(folder.parent, folder, kind="text", on_error="skip"))
    assert isinstance(skipped, Dropped)
    assert (skipped.source, skipped.reason, skipped.content) == ("odd.txt", "undecodable", "")
    assert skipped.detail in message
    (quarantined,) = everything(opened(folder.parent, folder, kind="text", on_error="quarantine"))
    assert isinstance(quarantined, Dropped)
    assert bool(quarantined.content) == (b"\0" not in data)


def test_a_given_encoding_is_used_and_an_unknown_one_refused(folder: Path) -> None:
    (folder / "fr.txt").write_bytes("déjà".encode("cp1252"))
    (only,) = everything(opened(folder.parent, folder, kind="text", encoding="cp1252"))
    assert only == Document(content="déjà", source="fr.txt", meta={"encoding": "cp1252"})
    for wrong in ("cp99999", "hex"):
        with pytest.raises(DataError, match=wrong):
            opened(folder.parent, folder, kind="text", encoding=wrong)


# --- which files ------------------------------------------------------------------------------------------------------


def test_globs_links_and_order(tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("b.txt", "a.md", "deep/er/c.txt", "deep/skip.txt", "x.bin", "[1].txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "linked.txt").write_text("linked")
    (root / "link").symlink_to(tmp_path / "other")
    (root / "deep" / "loop").symlink_to(root)
    os.mkfifo(root / "pipe.txt")
    source = opened(tmp_path, root, kind="text", include=["**/*.txt", "*.md"], exclude=["**/skip.*"])
    assert [item.name for item in source.inputs] == ["[1].txt", "a.md", "b.txt", "deep/er/c.txt", "link/linked.txt"]
    assert texts(opened(tmp_path, root, kind="text", include=["[[]1].t?t"])) == ["[1].txt"]
    assert texts(opened(tmp_path, root / "b.txt", kind="text")) == ["b.txt"]


@pytest.mark.parametrize("kind", ["text", "jsonl", "json", "markdown", "parquet"])
def test_a_link_that_leads_nowhere_is_named_or_counted(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.x").write_text('{"text": "a"}')
    (root / "gone.x").symlink_to(tmp_path / "nowhere")
    (root / "loop.x").symlink_to(root / "loop.x")
    (root / "gone.other").symlink_to(tmp_path / "nowhere")
    refused(tmp_path, root, r"gone\.x: .*leads to no file.*\n.*exclude", kind=kind, include=["*.x"])
    for on_error in ("skip", "quarantine"):
        source = opened(tmp_path, root, kind=kind, include=["*.x"], on_error=on_error)
        assert dropped(source)[:2] == [("gone.x", "missing"), ("loop.x", "missing")]
        assert [item.name for item in source.inputs] == ["a.x"]
    if kind != "parquet":
        opened(tmp_path, root, kind=kind, include=["*.x"], exclude=["gone.*", "loop.*"])
    with pytest.raises(DataError, match="all that matches are links that lead nowhere"):
        opened(tmp_path, root, kind=kind, include=["gone.*"], on_error="skip")


def test_a_folder_that_may_not_be_read_stops_unless_it_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "lost+found").mkdir()
    (folder / "a.txt").write_text("a")
    scan = os.scandir

    def scandir(path: Path) -> Any:
        if Path(path).name == "lost+found":  # whoever runs the tests may be allowed to read everything
            raise PermissionError
        return scan(path)

    monkeypatch.setattr("outgrow.streaming.sources.files.os.scandir", scandir)
    for exclude in ((), ("lost+found/*",)):  # what may lie deeper is not left out
        message = refused(folder.parent, folder, "the folder cannot be read", kind="text", exclude=exclude)
        assert "['lost+found/**']" in message
    assert texts(opened(folder.parent, folder, kind="text", exclude=("lost+found/**",))) == ["a"]


def test_missing_and_empty_sources_are_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="no file or folder .*nowhere"):
        opened(folder.parent, folder / "nowhere", kind="text")
    with pytest.raises(DataError, match=r"no file in .*a matches \*\*/\*.jsonl"):
        opened(folder.parent, folder, kind="jsonl")
    (folder / "nothing.txt").touch()
    (folder / "space.txt").write_text(" \n\t\u2003\n")
    expected = [Dropped(source=name, reason="empty", detail="it has no text") for name in ("nothing.txt", "space.txt")]
    assert everything(opened(folder.parent, folder, kind="text")) == expected


def test_a_changed_file_is_noticed(folder: Path) -> None:
    file = folder / "x.txt"
    file.write_text("one")
    source = opened(folder.parent, folder, kind="text")
    source.check_unchanged()
    file.write_text("two")
    with pytest.raises(DataError, match="changed while"):
        source.check_unchanged()


def test_a_file_that_is_too_long_is_refused_when_the_source_is_opened(folder: Path) -> None:
    with open(folder / "long.txt", "wb") as file:
        file.truncate(256 * 1024 * 1024 + 1)
    (folder / "short.txt").write_text("short")
    with pytest.raises(DataError, match=r"long\.txt: 268,435,457 bytes are too long for one document; at most 268,435,456"):
        opened(folder.parent, folder, kind="text")
    source = opened(folder.parent, folder, kind="text", on_error="skip")
    assert dropped(source) == [("long.txt", "malformed")]
    assert texts(source) == ["short"]


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(folder: Path, text: str) -> Document:
    (folder / "a.md").write_text(text, newline="")
    (only,) = kept(opened(folder.parent, folder, kind="markdown"))
    return only


def test_front_matter_becomes_metadata(folder: Path) -> None:
    head = "---\ntitle: О книге\ndate: 2024-05-06\ntags: [a, b]\ndraft: false\nn: 3\nmore: {x: null}\n---\n"
    for end in ("\n", "\r\n"):
        only = markdown(folder, head.replace("\n", end) + f"{end}# Text{end}---{end}a: b{end}---{end}")
        assert only.content == f"{end}# Text{end}---{end}a: b{end}---{end}"
        assert only.meta == {
            "title": "О книге",
            "date": "2024-05-06",
            "tags": ["a", "b"],
            "draft": False,
            "n": 3,
            "more": {"x": None},
        }
    assert markdown(folder, "---\na: 1\n...\nrest").content == "rest"
    assert markdown(folder, "---\n---\nrest").content == "rest"


@pytest.mark.parametrize(
    "text",
    [
        "# No front matter\n---\na: 1\n---\n",
        "---\njust words between rules\n---\nmore\n",
        "---\na: 1\nno end",
        "----\na: 1\n----\n",
        "--- a: 1\n---\n",
        "---\n" + "x" * 300_000 + "\n---\nrest",
    ],
)
def test_what_is_no_front_matter_stays_text(folder: Path, text: str) -> None:
    assert markdown(folder, text) == Document(content=text, source="a.md")


@pytest.mark.parametrize(
    ("lines", "line", "reason"),
    [
        ("a: 1\nb: [1", 4, "not valid YAML"),
        ("a: 1\na: 2", 3, "a: given twice"),
        ("a: &x [1]\nb: *x", 3, "aliases"),
        ("a: 1\nx: !!python/object:os.system ls", 3, "tag"),
        ("a: " + "[" * 400, 1, "nested"),
    ],
)
def test_bad_front_matter_is_named_with_its_line(folder: Path, lines: str, line: int, reason: str) -> None:
    (folder / "a.md").write_text(f"---\n{lines}\n---\ntext\n")
    refused(folder.parent, folder, rf"a\.md:{line}: the front matter: .*({reason})", kind="markdown")
    (item,) = everything(opened(folder.parent, folder, kind="markdown", on_error="quarantine"))
    assert isinstance(item, Dropped) and item.content.startswith("---\na: ")
    assert dropped(opened(folder.parent, folder, kind="markdown", on_error="skip")) == [("a.md", "malformed")]
