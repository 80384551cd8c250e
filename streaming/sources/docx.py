"""Source ``docx``: Word documents, each one document: paragraphs and tables in their order, footnotes at the end.

python-docx opens the package. The text is read from the elements themselves, since its paragraphs leave out what stands in
content controls, in text boxes and in insertions that nobody has accepted yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lxml import etree

from outgrow.recipes.schema.sources import DocxSource
from outgrow.streaming.sources.archive import Archive
from outgrow.streaming.sources.document import BadRecordError, Document
from outgrow.streaming.sources.flow import Flow
from outgrow.streaming.sources.xml_tree import MAX_DEPTH, local_name, parse_xml, words_within

_WORD = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
_HEADINGS = frozenset({"title", "subtitle", *(f"heading {level}" for level in range(1, 10))})
_CONTENTS = frozenset(f"toc {level}" for level in range(1, 10))
_OLD_WORD = b"\xd0\xcf\x11\xe0"


@dataclass(frozen=True, kw_only=True)
class DocxReader:
    """A document a file."""

    def read(self, path: Path, name: str) -> Iterator[Document]:
        _check(path)
        parts = _opened(path)
        text = WordText(_style_names(parts.styles), _notes(parts.notes))
        text.body(parts.body)
        yield Document(content=text.text(), source=name, meta=_meta(parts.properties))


def reader(source: DocxSource) -> DocxReader:
    """How files of the source are read."""
    return DocxReader()


class WordText:
    """The text of WordprocessingML. ``styles`` are the names of styles by id, ``notes`` footnotes and endnotes by kind and id.

    Lines of a table of contents are left out.
    """

    _SILENT = frozenset({"pPr", "rPr", "sdtPr", "sdtEndPr", "tblPr", "trPr", "tcPr", "sectPr", "del", "moveFrom", "instrText"})
    """Properties, codes of fields, and what was deleted while changes were tracked."""

    def __init__(self, styles: dict[str, str], notes: dict[tuple[str, str], etree._Element]) -> None:
        self._flow = Flow()
        self._styles = styles
        self._notes = notes
        self._numbers: dict[tuple[str, str], int] = {}  # of the notes that were referred to, in the order of their numbers
        self._boxes: list[etree._Element] = []
        self._depth = 0

    def body(self, parent: etree._Element) -> None:
        """The blocks within an element: paragraphs, tables, and what holds such."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise BadRecordError(f"its elements are nested too deeply; at most {MAX_DEPTH} levels")
        for element in parent:
            tag = local_name(element)
            if tag == "p":
                self._paragraph(element)
            elif tag == "tbl":
                self._flow.gap()
                self.body(element)
                self._flow.gap()
            elif tag == "tr":
                self._row(element)
            elif tag and tag not in self._SILENT:
                self.body(element)
        self._depth -= 1

    def text(self) -> str:
        """All that was added, then the footnotes that it refers to, and those that they refer to."""
        self._flow.gap()
        done = 0
        while done < len(self._numbers):
            cited = list(self._numbers)[done:]
            for key in cited:
                self._flow.prefix(f"[{self._numbers[key]}] ")
                self.body(self._notes[key])
                self._flow.prefix("")
            done += len(cited)
        return self._flow.text()

    def _paragraph(self, element: etree._Element) -> None:
        style = element.find(f"{_WORD}pPr/{_WORD}pStyle")
        name = "" if style is None else self._styles.get(style.get(f"{_WORD}val") or "", "")
        if name in _CONTENTS:
            return
        if name in _HEADINGS:
            self._flow.gap()
        self._runs(element)
        if not self._flow.end_line() or name in _HEADINGS:
            self._flow.gap()
        boxes, self._boxes = self._boxes, []
        for box in boxes:
            self.body(box)

    def _runs(self, parent: etree._Element) -> None:
        """The text within a paragraph; boxes in it wait until it ends."""
        stack: list[Iterator[etree._Element]] = [iter(parent)]
        while stack:
            element = next(stack[-1], None)
            if element is None:
                stack.pop()
                continue
            tag = local_name(element)
            match tag:
                case "t":
                    self._flow.verbatim(element.text)
                case "tab" | "ptab":
                    self._flow.verbatim("\t")
                case "br" | "cr":
                    self._flow.line_break()
                case "noBreakHyphen":
                    self._flow.verbatim("\u2011")
                case "softHyphen":
                    self._flow.verbatim("\u00ad")
                case "footnoteReference" | "endnoteReference":
                    self._cite(tag.removesuffix("Reference"), element.get(f"{_WORD}id") or "")
                case "txbxContent":
                    self._boxes.append(element)
                case "AlternateContent":  # the same for new and for old programs; the first is for new ones
                    stack.append(iter(element.findall("*")[:1]))
                case _ if tag and tag not in self._SILENT:
                    stack.append(iter(element))

    def _row(self, element: etree._Element) -> None:
        cells = [cell for cell in element.iter(f"{_WORD}tc") if next(cell.iterancestors(f"{_WORD}tr")) is element]
        if len(cells) == 1:
            self.body(cells[0])
        else:
            self._flow.verbatim("\t".join(self._cell(cell) for cell in cells))
            self._flow.end_line()

    def _cell(self, cell: etree._Element) -> str:
        outer, self._flow = self._flow, Flow()
        self.body(cell)
        text, self._flow = self._flow.text(), outer
        return " ".join(text.split())

    def _cite(self, kind: str, note_id: str) -> None:
        if (kind, note_id) in self._notes:
            number = self._numbers.setdefault((kind, note_id), len(self._numbers) + 1)
            self._flow.verbatim(f"[{number}]")


def _check(path: Path) -> None:
    """Raises ``BadRecordError`` for what python-docx should not open: it reads every part whole, and trusts it."""
    with open(path, "rb") as file:
        if file.read(4) == _OLD_WORD:
            raise BadRecordError("it is encrypted, or of an old version of Word (.doc); save it as .docx without a password")
    with Archive(path) as archive:
        for member in archive.names:
            data = archive.read(member)
            if member.endswith((".xml", ".rels")):
                parse_xml(data, member)


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What is used of a package: the document's body and styles, notes by kind (``footnote``, ``endnote``), core properties."""

    body: etree._Element
    styles: etree._Element
    notes: dict[str, bytes]
    properties: bytes | None


def _opened(path: Path) -> _Parts:
    import docx

    try:
        word = docx.Document(str(path))
        parts = [(r.reltype.rpartition("/")[2], r.target_part.blob) for r in word.part.rels.values() if not r.is_external]
        package = [(r.reltype.rpartition("/")[2], r.target_part) for r in word.part.package.rels.values() if not r.is_external]
        return _Parts(
            body=word.element.body,
            styles=word.styles.element,
            notes={kind.removesuffix("s"): blob for kind, blob in parts if kind in ("footnotes", "endnotes")},
            properties=next((part.blob for kind, part in package if kind == "core-properties"), None),
        )
    except OSError:
        raise
    except Exception as error:  # a package that lacks a part, or links parts in an odd way, raises anything
        raise BadRecordError(f"it is no Word document that can be read: {str(error) or type(error).__name__}") from None


def _style_names(styles: etree._Element) -> dict[str, str]:
    """The names of styles, which are English whatever language Word was in, by their ids, which are not."""
    names = [(style.get(f"{_WORD}styleId"), style.find(f"{_WORD}name")) for style in styles.iter(f"{_WORD}style")]
    return {style: (name.get(f"{_WORD}val") or "").lower() for style, name in names if style and name is not None}


def _notes(blobs: dict[str, bytes]) -> dict[tuple[str, str], etree._Element]:
    """Footnotes and endnotes by kind and id; the lines that divide them from the text are not among them."""
    return {
        (kind, note.get(f"{_WORD}id") or ""): note
        for kind, blob in blobs.items()
        for note in parse_xml(blob, f"{kind}s").iter(f"{_WORD}{kind}")
        if note.get(f"{_WORD}type") in (None, "normal")
    }


def _meta(properties: bytes | None) -> dict[str, Any]:
    """Title, authors and language, where the document names them."""
    if properties is None:
        return {}
    texts = {local_name(element): words_within(element) for element in parse_xml(properties, "core properties")}
    found = {
        "title": texts.get("title"),
        "authors": [name.strip() for name in texts.get("creator", "").split(";") if name.strip()],
        "language": texts.get("language"),
    }
    return {key: value for key, value in found.items() if value}
