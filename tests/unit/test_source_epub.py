"""EPUB books: the text of real ones, and broken ones that are bounded and named."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import pytest
from read_files import FILES, read, read_one, refused, text_of

from outgrow.streaming.sources import BadRecordError, archive, xml_tree

BOOK = """\
Записки о тумане

Анна Серова
John Marsh

Глава первая

Кто видел туман, тот видел всё.

Утром над рекой стоял туман — густой, как молоко. Лодка шла
медленно, и никто не говорил[1].
«Не греби»,\u00a0— сказал лоцман. He said it twice, in English too.

Список вещей

- весло;
- фонарь & спички;
  - сухие;
- хлеб.
1. Сначала свет.
2. Потом берег.

1. Лодка звалась «Чайка».
Так её назвал дед.

Chapter two

Harbour\tDepth
Север\t12 m
Юг\t7 m

Ветер, ветер,
ты могуч,

ты гоняешь стаи туч.

if fog > 3:
    print("wait")

The end."""

CONTAINER = '<container><rootfiles><rootfile full-path="content.opf"/></rootfiles></container>'


def book(path: Path, *chapters: str, package: str = "", **members: str | bytes) -> Path:
    """A book of the bodies of chapters; ``members`` replace files of it (``_`` for ``.``) or add some."""
    items = "".join(f'<item id="c{n}" href="c{n}.xhtml" media-type="application/xhtml+xml"/>' for n in range(len(chapters)))
    spine = "".join(f'<itemref idref="c{n}"/>' for n in range(len(chapters)))
    package = package or f"<package><metadata/><manifest>{items}</manifest><spine>{spine}</spine></package>"
    files: dict[str, str | bytes] = {"META-INF/container.xml": CONTAINER, "content.opf": package}
    files |= {f"c{n}.xhtml": chapter for n, chapter in enumerate(chapters)} | members
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return path


def xhtml(body: str) -> str:
    return f"<html xmlns='http://www.w3.org/1999/xhtml'><head><title>no</title></head><body>{body}</body></html>"


@pytest.mark.parametrize("name", ["book.epub", "book-2.epub"])
def test_the_text_and_metadata_of_a_book(name: str) -> None:
    document = read_one("epub", FILES / name)
    assert document.content == BOOK
    assert document.source == name
    assert document.meta == {"title": "Записки о тумане", "authors": ["Анна Серова", "John Marsh"], "language": "ru"}


def test_a_book_of_another_program() -> None:
    document = read_one("epub", FILES / "ebooklib.epub")
    assert document.content == "Первая\n\nТуман\u00a0лёг.[1]\n\n1\nFog.\n\nOne\ncell"
    assert document.meta == {"title": "Туман", "authors": ["Анна Серова"], "language": "ru"}


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<p>a&nbsp;b&mdash;c</p>", "a\u00a0b—c"),
        ("<p><![CDATA[&nbsp;]]>&nbsp;x<!-- &nbsp; --></p>", "&nbsp;\u00a0x"),
        ("<div>one<div>two</div>three</div>", "one\ntwo\nthree"),
        ("<p>one<!-- no -->two<?php no ?> three</p>", "onetwo three"),
        ("<p>  a \n\t b  </p><p> <b>c</b> d</p>", "a b\nc d"),
        ("<p>a<br/><br/><br/><br/>b</p>", "a\n\nb"),
        ("<script>no</script><nav><p>no</p></nav><p>yes</p>", "yes"),
        ("<pre>  x\n\n\ty </pre><p>z</p>", "  x\n\n\ty\n\nz"),
        ("<ol start='7'><li><p>a</p></li><li/><li>b</li></ol><p>c</p>", "7. a\n9. b\nc"),
        ("<p>word<a href='#n'>2</a> word<sup><a href='#n'>3</a></sup> <a href='#r'>↩</a>m<sup>2</sup></p>", "word2 word[3] m2"),
        ("<p>a<a epub:type='noteref' xmlns:epub='http://www.idpf.org/2007/ops'>*</a></p>", "a[*]"),
        ("<h1>A<br/>B</h1><p>c</p><hr/><p>d</p>", "A\nB\n\nc\n\nd"),
        ("<table><tr><td>a<table><tr><td>b</td><td>c</td></tr></table></td><td> d e</td></tr></table>", "a b c\td e"),
    ],
)
def test_elements_become_lines(tmp_path: Path, body: str, text: str) -> None:
    assert text_of("epub", book(tmp_path / "b.epub", xhtml(body))) == text


def test_chapters_come_in_the_order_of_the_spine_without_pictures(tmp_path: Path) -> None:
    package = (
        "<package><manifest><item id='b' href='c1.xhtml' media-type='application/xhtml+xml'/><item id='p' href='p.svg'"
        " media-type='image/svg+xml'/><item id='a' href='c0.xhtml#x' media-type='text/html'/></manifest>"
        "<spine><itemref idref='b'/><itemref idref='p'/><itemref idref='a'/></spine></package>"
    )
    path = book(tmp_path / "b.epub", xhtml("<p>a</p>"), xhtml("<p>b</p>"), package=package)
    assert text_of("epub", path) == "b\n\na"


@pytest.mark.parametrize("declared", ["windows-1251", "utf-16"])
def test_chapters_may_be_in_another_encoding(tmp_path: Path, declared: str) -> None:
    data = f"<?xml version='1.0' encoding='{declared}'?>{xhtml('<p>Туман</p>')}".encode(declared)
    assert text_of("epub", book(tmp_path / "b.epub", "", **{"c0.xhtml": data})) == "Туман"


# --- broken books -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_book_is_named(tmp_path: Path, share: float) -> None:
    data = (FILES / "book.epub").read_bytes()
    (tmp_path / "b.epub").write_bytes(data[: int(len(data) * share)])
    refused("epub", tmp_path / "b.epub", "the zip file is damaged, or is none: File is not a zip file")


def test_flipped_bytes_are_found_or_do_no_harm(tmp_path: Path) -> None:
    data = (FILES / "book.epub").read_bytes()
    draw = random.Random(1)
    named = 0
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            broken[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "b.epub").write_bytes(broken)
        try:
            (document,) = read("epub", tmp_path / "b.epub")
        except BadRecordError:
            named += 1
        else:
            assert not isinstance(document, BadRecordError) and document.content == BOOK
    assert named > 75


@pytest.mark.parametrize(
    ("chapter", "message"),
    [
        (xhtml("<p>a"), r"c0.xhtml: not well-formed XML: .*line 1 of it"),
        (xhtml("<p>Привет</p>").encode("cp1251"), "c0.xhtml: it is not in the encoding that it declares"),
        (f"<?xml version='1.0' encoding='windows-1251'?>{xhtml('Туман' * 9)}", "declares windows-1251, but is UTF-8"),
        (xhtml("<div>" * 99 + "</div>" * 99), "nested too deeply; at most 100 levels"),
        (xhtml("<div>" * 9999 + "</div>" * 9999), "nested too deeply; at most 100 levels"),
        ('<!DOCTYPE a [<!ENTITY e "x">]><a>&e;</a>', "the entity &e; is not expanded"),
        ('<!DOCTYPE a [<!ENTITY e SYSTEM "file:///etc/passwd">]><a>&e;</a>', "the entity &e; is not expanded"),
        (xhtml("&unknown;"), "Entity 'unknown' not defined"),
        (xhtml("x" * 10_100_000), "one of its texts has more than 10,000,000 characters"),
        ("", "c0.xhtml: not well-formed XML: Document is empty"),
    ],
)
def test_broken_chapters_are_named(tmp_path: Path, chapter: str | bytes, message: str) -> None:
    bad = refused("epub", book(tmp_path / "b.epub", "", **{"c0.xhtml": chapter}), message)
    assert bad.line == 0


def test_billion_laughs_are_not_told(tmp_path: Path) -> None:
    laughs = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    chapter = f'<!DOCTYPE a [<!ENTITY l0 "lol">{laughs}]><a b="&l9;">&l9;</a>'
    refused("epub", book(tmp_path / "b.epub", chapter), "its entities expand to far more than the file holds")


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("<package/>", "content.opf: the spine names no chapter"),
        ("<package><spine><itemref idref='x'/></spine></package>", "names 'x', which the manifest does not list"),
        (
            "<package><item id='x' href='y%20z.xhtml' media-type='text/html'/><itemref idref='x'/></package>",
            "it holds no file y z.xhtml",
        ),
        (
            "<package><item id='x' href='a.pdf' media-type='application/pdf'/><itemref idref='x'/></package>",
            "a.pdf is of type application/pdf; allowed in the spine: application/xhtml",
        ),
    ],
)
def test_broken_packages_are_named(tmp_path: Path, package: str, message: str) -> None:
    refused("epub", book(tmp_path / "b.epub", package=package), message)


def test_missing_containers_and_protected_chapters_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "empty.epub", "w") as file:
        file.writestr("mimetype", "application/epub+zip")
    refused("epub", tmp_path / "empty.epub", "it holds no file META-INF/container.xml")
    encryption = "<encryption><CipherData><CipherReference URI='{}'/></CipherData></encryption>"
    members = {"META-INF/encryption.xml": encryption.format("c0.xhtml")}
    refused("epub", book(tmp_path / "drm.epub", xhtml("x"), **members), r"c0.xhtml is encrypted \(copy protection\)")
    members = {"META-INF/encryption.xml": encryption.format("fonts/a.otf")}
    assert text_of("epub", book(tmp_path / "font.epub", xhtml("x"), **members)) == "x"


# --- bounds of archives and XML ---------------------------------------------------------------------------------------


def test_what_decompresses_too_far_is_refused_whatever_the_headers_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_DOCUMENT_BYTES", 1_000_000)
    path = book(tmp_path / "b.epub", *[xhtml(f"<p>{'x' * 400_000}</p>")] * 3)
    refused("epub", path, "it decompresses to more than 1,000,000 bytes")
    data = path.read_bytes()
    size = len(xhtml(f"<p>{'x' * 400_000}</p>")).to_bytes(4, "little")
    assert data.count(size) == 6
    path.write_bytes(data.replace(size, (100).to_bytes(4, "little")))
    refused("epub", path, "the zip file is damaged, or is none: c0.xhtml: Bad CRC-32")


def test_archives_of_too_many_files_or_with_a_huge_table_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = book(tmp_path / "b.epub", xhtml("x"), **{f"f{n}": "" for n in range(50)})
    monkeypatch.setattr(archive, "MAX_MEMBERS", 52)
    refused("epub", path, "it holds 53 files; at most 52")
    monkeypatch.setattr(archive, "_DIRECTORY_BYTES", 2000)
    refused("epub", path, "its table of contents has 2,[0-9]{3} bytes; at most 2,000")


def test_encrypted_and_oddly_compressed_members_are_refused(tmp_path: Path) -> None:
    path = book(tmp_path / "b.epub", xhtml("x"))
    data = path.read_bytes().replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01")
    (tmp_path / "locked.epub").write_bytes(data)
    refused("epub", tmp_path / "locked.epub", "META-INF/container.xml in it is encrypted")
    with zipfile.ZipFile(tmp_path / "lzma.epub", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("META-INF/container.xml", CONTAINER)
    refused("epub", tmp_path / "lzma.epub", r"compressed by method 14; allowed: 0 \(stored\), 8 \(deflate\)")


def test_xml_of_too_many_tags_is_refused_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xml_tree, "MAX_TAGS", 1000)
    assert text_of("epub", book(tmp_path / "a.epub", xhtml("<b>x</b>" * 450))) == "x" * 450
    refused("epub", book(tmp_path / "b.epub", xhtml("<b>x</b>" * 500)), "c0.xhtml: it has more than 1,000 tags")
    refused("epub", book(tmp_path / "c.epub", xhtml("<b c='' />" * 500)), "c0.xhtml: it has more than 1,000 tags")
