"""Word documents: the text of real ones, what python-docx's paragraphs leave out, and broken ones that are named."""

from __future__ import annotations

import random
import zipfile
from pathlib import Path

import docx
import pytest
from docx.oxml import parse_xml
from docx.oxml.ns import nsdecls
from read_files import FILES, read, read_one, refused, text_of

from outgrow.streaming.sources import BadRecordError, archive

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

весло;
фонарь & спички;
сухие;
хлеб.
Сначала свет.
Потом берег.

Chapter two

Harbour\tDepth
Север\t12 m
Юг\t7 m

Ветер, ветер,
ты могуч,

ты гоняешь стаи туч.
if fog > 3:
    print("wait")
The end.

[1] Лодка звалась «Чайка».
Так её назвал дед."""


def word(path: Path, *blocks: str) -> Path:
    """A document by python-docx whose body holds the blocks, in WordprocessingML."""
    document = docx.Document()
    for block in blocks:
        namespaces = nsdecls("w", "wp", "a", "m") + (
            ' xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
            ' xmlns:wps="http://schemas.microsoft.com/office/word/2010/wordprocessingShape"'
        )
        end = block.index(">") if block[block.index(">") - 1] != "/" else block.index("/>")
        document.element.body.insert_element_before(parse_xml(f"{block[:end]} {namespaces}{block[end:]}"), "w:sectPr")
    document.save(str(path))
    return path


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t xml:space='preserve'>{text}</w:t></w:r></w:p>"


def run(text: str, around: str) -> str:
    return f"<w:p>{around.format(f'<w:r><w:t>{text}</w:t></w:r>')}</w:p>"


BOX = f"<w:txbxContent>{paragraph('box')}</w:txbxContent>"
NEW, OLD = f"<mc:Choice><wps:txbx>{BOX}</wps:txbx></mc:Choice>", f"<mc:Fallback>{BOX}</mc:Fallback>"


def test_the_text_and_metadata_of_a_document() -> None:
    document = read_one("docx", FILES / "book.docx")
    assert document.content == BOOK
    assert document.source == "book.docx"
    assert document.meta == {"title": "Записки о тумане", "authors": ["Анна Серова", "John Marsh"], "language": "ru"}


def test_a_document_of_another_program(tmp_path: Path) -> None:
    document = docx.Document()
    document.add_heading("Туман", 0)
    document.add_paragraph("Первый.\tОтступ\nстрока")
    document.add_heading("Глава", 1)
    table = document.add_table(rows=2, cols=3)
    table.cell(0, 0).merge(table.cell(0, 1)).text = "слиты"
    table.cell(0, 2).text = "два\nабзаца"
    table.cell(1, 1).add_table(1, 2).cell(0, 0).text = "внутри"
    document.add_paragraph("Конец.")
    document.sections[0].header.paragraphs[0].text = "колонтитул"
    document.core_properties.title, document.core_properties.author = "Книга", "Иван Петров; Fog"
    document.save(str(tmp_path / "b.docx"))
    read_back = read_one("docx", tmp_path / "b.docx")
    assert read_back.content == "Туман\n\nПервый.\tОтступ\nстрока\n\nГлава\n\nслиты\tдва абзаца\n\tвнутри\n\nКонец."
    assert read_back.meta == {"title": "Книга", "authors": ["Иван Петров", "Fog"]}


@pytest.mark.parametrize(
    ("block", "text"),
    [
        (f"<w:sdt><w:sdtPr><w:alias w:val='no'/></w:sdtPr><w:sdtContent>{paragraph('a')}</w:sdtContent></w:sdt>", "a"),
        (run("new", "<w:ins w:id='1'>{}</w:ins><w:del w:id='2'><w:r><w:delText>old</w:delText></w:r></w:del>"), "new"),
        ("<w:p><w:r><w:t>a</w:t><w:noBreakHyphen/><w:t>b</w:t><w:tab/><w:t>c</w:t></w:r></w:p>", "a\u2011b\tc"),
        (run("7", "<w:r><w:instrText>PAGE</w:instrText></w:r><w:fldSimple w:instr='PAGE'>{}</w:fldSimple>"), "7"),
        ("<w:p><m:oMath><m:r><m:t>x=1</m:t></m:r></m:oMath></w:p>", "x=1"),
        (run("words", f"<w:r><mc:AlternateContent>{NEW}{OLD}</mc:AlternateContent></w:r>{{}}"), "words\nbox"),
        ("<w:tbl><w:tr><w:tc>" + paragraph("one") + paragraph("cell") + "</w:tc></w:tr></w:tbl>", "one\ncell"),
    ],
)
def test_text_in_controls_insertions_fields_and_boxes_is_read(tmp_path: Path, block: str, text: str) -> None:
    assert text_of("docx", word(tmp_path / "b.docx", block)) == text


def test_empty_paragraphs_are_pauses_and_tables_of_contents_go(tmp_path: Path) -> None:
    path = word(tmp_path / "b.docx", paragraph("a"), paragraph(" "), paragraph(""), paragraph("b"), paragraph("c"))
    assert text_of("docx", path) == "a\n\nb\nc"
    document = docx.Document()
    document.styles.add_style("toc 1", docx.enum.style.WD_STYLE_TYPE.PARAGRAPH)
    document.add_paragraph("Глава ..... 5", style="toc 1")
    document.add_paragraph("text")
    document.save(str(tmp_path / "toc.docx"))
    assert text_of("docx", tmp_path / "toc.docx") == "text"


# --- broken documents -------------------------------------------------------------------------------------------------


def changed(path: Path, name: str, data: bytes | None) -> Path:
    """The real document with another file (or none) in place of one of its own."""
    with zipfile.ZipFile(FILES / "book.docx") as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            content = data if member == name else old.read(member)
            if content is not None:
                new.writestr(member, content)
    return path


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("word/document.xml", None, "it is no Word document that can be read"),
        ("word/document.xml", b"<a/>", "it is no Word document that can be read"),
        ("word/document.xml", b"<w:document", "word/document.xml: not well-formed XML"),
        ("word/document.xml", b"<a>" * 300 + b"</a>" * 300, "word/document.xml: its elements are nested too deeply"),
        ("word/document.xml", b'<!DOCTYPE a [<!ENTITY x "y">]><a>&x;</a>', "the entity &x; is not expanded"),
        ("word/styles.xml", b"<styles>\xff</styles>", "word/styles.xml: it is not in the encoding"),
        ("[Content_Types].xml", None, "it is no Word document that can be read"),
        ("_rels/.rels", b"<Relationships/>", "it is no Word document that can be read"),
    ],
)
def test_broken_parts_are_named(tmp_path: Path, name: str, data: bytes | None, message: str) -> None:
    refused("docx", changed(tmp_path / "b.docx", name, data), message)


def test_deep_nesting_within_what_the_parser_takes_is_named(tmp_path: Path) -> None:
    block = "<w:tbl><w:tr><w:tc>" * 60 + paragraph("x") + "</w:tc></w:tr></w:tbl>" * 60
    refused("docx", word(tmp_path / "b.docx", block), "nested too deeply; at most 100 levels")


def test_truncated_old_and_huge_documents_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.docx"
    path.write_bytes((FILES / "book.docx").read_bytes()[:5000])
    refused("docx", path, "the zip file is damaged, or is none")
    path.write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))
    refused("docx", path, r"encrypted, or of an old version of Word \(.doc\)")
    monkeypatch.setattr(archive, "MAX_DOCUMENT_BYTES", 100_000)
    refused("docx", changed(path, "word/theme/theme1.xml", b"<a>" + b" " * 100_000 + b"</a>"), "more than 100,000 bytes")


def test_flipped_bytes_are_found_or_do_no_harm(tmp_path: Path) -> None:
    data = (FILES / "book.docx").read_bytes()
    draw = random.Random(2)
    for _ in range(40):
        broken = bytearray(data)
        broken[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        (tmp_path / "b.docx").write_bytes(broken)
        try:
            (document,) = read("docx", tmp_path / "b.docx")
        except BadRecordError:
            continue
        assert not isinstance(document, BadRecordError) and document.content == BOOK
