"""FictionBook: the text of real books, their notes, and broken ones that are bounded and named."""

from __future__ import annotations

import base64
import zipfile
from pathlib import Path

import pytest
from read_files import FILES, read, read_one, refused, text_of

from outgrow.streaming.sources import BadRecordError

BEFORE_NOTES = """\
Записки о тумане

Глава первая

Кто видел туман, тот видел всё.

Утром над рекой стоял туман — густой, как молоко. Лодка шла медленно, и никто не говорил{reference}.
«Не греби»,\u00a0— сказал лоцман. He said it twice, in English too.

Список вещей

•\u00a0весло;
•\u00a0фонарь & спички;
•\u00a0•\u00a0сухие;
•\u00a0хлеб.
1.\u00a0Сначала свет.
2.\u00a0Потом берег.

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
NOTES = "\n\n[1] Лодка звалась «Чайка».\nТак её назвал дед."


def book(path: Path, body: str, *, info: str = "", head: str = "", encoding: str = "utf-8") -> Path:
    text = (
        f'{head}<FictionBook xmlns="http://www.gribuser.ru/xml/fictionbook/2.0" xmlns:l="http://www.w3.org/1999/xlink">'
        f"<description><title-info>{info}</title-info></description>{body}</FictionBook>"
    )
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize("name", ["book.fb2", "book.fb2.zip"])
@pytest.mark.parametrize("notes", ["keep", "drop"])
def test_the_text_and_metadata_of_a_book(name: str, notes: str) -> None:
    document = read_one("fb2", FILES / name, notes=notes)
    reference = "[1]" if notes == "keep" else ""
    assert document.content == BEFORE_NOTES.format(reference=reference) + (NOTES if notes == "keep" else "")
    assert document.source == name
    assert document.meta == {
        "title": "Записки о тумане",
        "authors": ["Анна Серова", "John Marsh"],
        "language": "ru",
        "genres": ["unrecognised"],
    }


@pytest.mark.parametrize("declared", ["windows-1251", "koi8-r", "utf-16"])
def test_the_declared_encoding_is_used(tmp_path: Path, declared: str) -> None:
    head = f'<?xml version="1.0" encoding="{declared}"?>'
    path = book(tmp_path / "b.fb2", "<body><section><p>Ёж</p></section></body>", head=head, encoding=declared)
    assert text_of("fb2", path) == "Ёж"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("<title><p>Имя</p><p>Книги</p></title><section><p>a</p></section>", "Имя\nКниги\n\na"),
        ("<epigraph><p>e</p><text-author>Кто-то</text-author></epigraph><section><p>a</p></section>", "e\nКто-то\n\na"),
        ("<section><p>a</p><subtitle>* * *</subtitle><p>b</p><empty-line/><p>c</p></section>", "a\n\n* * *\n\nb\n\nc"),
        ("<section><p>a<image l:href='#i'/>b</p><image l:href='#i'/><p>c</p></section>", "ab\nc"),
        (
            "<section><poem><title><p>T</p></title><stanza><v>a</v><v>b</v></stanza><stanza><v>c</v></stanza>"
            "<date>1824</date></poem></section>",
            "T\n\na\nb\n\nc\n\n1824",
        ),
        ("<section><section><p>a</p></section><section><p>b</p></section></section>", "a\n\nb"),
    ],
)
def test_elements_become_lines(tmp_path: Path, body: str, text: str) -> None:
    assert text_of("fb2", book(tmp_path / "b.fb2", f"<body>{body}</body>")) == text


def test_notes_in_groups_and_links_without_a_type(tmp_path: Path) -> None:
    main = "<body><section><p>a<a l:href='#n1'>1</a> b<a l:href='#n2'><sup>{2}</sup></a> <a l:href='http://x'>c</a></p></section></body>"
    note = "<section id='n{0}'><title><p>{0}</p></title><p>Note {0}</p></section>"
    notes = f"<section><title><p>Глава</p></title>{note.format(1)}</section>{note.format(2)}"
    body = f"{main}<body name='notes'><title><p>Примечания</p></title>{notes}</body>"
    path = book(tmp_path / "b.fb2", body)
    assert text_of("fb2", path) == "a[1] b{2} c\n\nПримечания\n\nГлава\n\n[1] Note 1\n[2] Note 2"
    assert text_of("fb2", path, notes="drop") == "a b c"


def test_authors_have_all_their_names(tmp_path: Path) -> None:
    info = (
        "<author><first-name>Лев</first-name><middle-name>Николаевич</middle-name><last-name>Толстой</last-name></author>"
        "<author><nickname>Fog</nickname></author><author/><book-title> Война\n и мир </book-title>"
    )
    document = read_one("fb2", book(tmp_path / "b.fb2", "<body><section><p>a</p></section></body>", info=info))
    assert document.meta == {"title": "Война и мир", "authors": ["Лев Николаевич Толстой", "Fog"]}


def test_pictures_beyond_what_the_parser_takes_are_passed_over(tmp_path: Path) -> None:
    picture = base64.encodebytes(bytes(9_000_000)).decode()
    body = f"<body><section><p>a</p></section></body><binary id='i' content-type='image/png'>{picture}</binary>"
    assert text_of("fb2", book(tmp_path / "b.fb2", body)) == "a"


def test_each_book_of_a_zip_file_is_a_document_and_a_broken_one_costs_itself_alone(tmp_path: Path) -> None:
    good = book(tmp_path / "good.fb2", "<body><section><p>a</p></section></body>").read_bytes()
    with zipfile.ZipFile(tmp_path / "b.fb2.zip", "w") as file:
        file.writestr("1.fb2", good)
        file.writestr("2.fb2", good[:-20])
        file.writestr("3.FB2", good)
        file.writestr("readme.txt", b"no")
    first, second, third = read("fb2", tmp_path / "b.fb2.zip")
    assert [first.source, second.source, third.source] == ["b.fb2.zip#1.fb2", "b.fb2.zip#2.fb2", "b.fb2.zip#3.FB2"]
    assert isinstance(second, BadRecordError)
    assert "2.fb2: not well-formed XML" in str(second)


# --- broken books -----------------------------------------------------------------------------------------------------


def test_what_is_broken_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "b.fb2"
    bad = refused("fb2", book(path, "<body>\n<section>\n<p>a & b</p></section></body>"), "not well-formed XML")
    assert bad.line == 3
    head = '<?xml version="1.0" encoding="utf-8"?>'
    bad = refused("fb2", book(path, "<body><p>Туман</p></body>", head=head, encoding="cp1251"), "it is not in the encoding")
    assert bad.reason == "undecodable"
    head = '<?xml version="1.0" encoding="windows-1251"?>\n'
    bad = refused("fb2", book(path, f"<body><p>{'Туман ' * 9}</p></body>", head=head), "declares windows-1251, but is UTF-8")
    assert (bad.reason, bad.line) == ("undecodable", 1)
    bad = refused("fb2", book(path, "<body>" + "<section>" * 3000 + "</section>" * 3000 + "</body>"), "nested too deeply")
    assert bad.reason == "malformed"
    refused(
        "fb2", book(path, "<body><section><p>&x;</p></section></body>", head='<!DOCTYPE a [<!ENTITY x "y">]>'), "entity &x;"
    )
    refused("fb2", book(path, ""), "the book has no body")
    path.write_text("<html/>")
    refused("fb2", path, "it is no FictionBook: its first element is 'html'")
    path.write_bytes((FILES / "book.fb2.zip").read_bytes()[:500])
    refused("fb2", path, "the zip file is damaged, or is none")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a.txt", "a")
    refused("fb2", path, "the zip file holds no .fb2 file")
