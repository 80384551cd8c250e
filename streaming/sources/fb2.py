"""Source ``fb2``: FictionBook books (.fb2, or in a zip file), each one document; footnotes stand at its end or are left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lxml import etree

from outgrow.recipes.schema.sources import Fb2Source
from outgrow.streaming.sources.archive import Archive, is_zip
from outgrow.streaming.sources.document import BadRecordError, Document
from outgrow.streaming.sources.flow import MarkupText
from outgrow.streaming.sources.xml_tree import local_name, parse_xml, text_within, words_within

_HREF = "{http://www.w3.org/1999/xlink}href"
_PICTURE = re.compile(rb"<binary\b[^<>]*>[A-Za-z0-9+/=\s]*</binary\s*>")
_NOTES = ("notes", "comments", "footnotes")


@dataclass(frozen=True, kw_only=True)
class Fb2Reader:
    """A book a file, or several in a zip file."""

    notes: Literal["keep", "drop"]

    def read(self, path: Path, name: str) -> Iterator[Document | BadRecordError]:
        if not is_zip(path):
            yield self._book(path.read_bytes(), name)
            return
        with Archive(path) as archive:
            books = [member for member in archive.names if member.lower().endswith(".fb2")]
            if not books:
                raise BadRecordError("the zip file holds no .fb2 file")
            for member in books:
                source = name if len(books) == 1 else f"{name}#{member}"
                try:
                    yield self._book(archive.read(member), source, member)
                except BadRecordError as bad:
                    bad.source = source
                    yield bad

    def _book(self, data: bytes, source: str, member: str = "") -> Document:
        root = parse_xml(_PICTURE.sub(_without_picture, data), member)
        if local_name(root) != "FictionBook":
            raise BadRecordError(f"it is no FictionBook: its first element is '{local_name(root)}'")
        return Document(content=_text(root, self.notes == "keep"), source=source, meta=_meta(root))


def reader(source: Fb2Source) -> Fb2Reader:
    """How files of the source are read."""
    return Fb2Reader(notes=source.notes)


class Fb2Text(MarkupText):
    """The text of FictionBook's elements. ``note_ids`` are the targets of links that lead to footnotes."""

    _SILENT = frozenset({"image", "stylesheet", "binary"})
    _LINES = frozenset({"p", "v", "text-author", "date"})
    _APART = frozenset({"title", "subtitle", "epigraph", "cite", "poem", "stanza", "annotation", "section", "table", "body"})

    def __init__(self, note_ids: frozenset[str], keep_notes: bool) -> None:
        super().__init__()
        self._note_ids = note_ids
        self._keep_notes = keep_notes

    def element(self, element: etree._Element) -> None:
        tag = local_name(element)
        if tag in self._SILENT:
            return
        if tag == "a" and self._leads_to_note(element):
            self._note_reference(element)
        elif tag == "empty-line":
            self.flow.gap()
        elif tag == "code":
            self.flow.verbatim(text_within(element))
        elif tag == "tr":
            self.row([child for child in element if local_name(child) in ("td", "th")])
        elif tag in self._LINES:
            self.flow.end_line()
            self.inside(element)
            self.flow.end_line()
        elif tag in self._APART:
            self.flow.gap()
            self.inside(element)
            self.flow.gap()
        else:
            self.inside(element)

    def note(self, section: etree._Element) -> None:
        """A footnote: its number in brackets, then what it says; or a section of footnotes, one after the other."""
        self.flow.end_line()
        title = next((child for child in section if local_name(child) == "title"), None)
        if any(local_name(child) == "section" for child in section):
            self.notes(section)
            return
        label = "" if title is None else words_within(title)
        if title is not None:
            section.remove(title)
        if label:
            self.flow.prefix(f"{_bracketed(label)} ")
        self.inside(section)
        self.flow.end_line()
        self.flow.prefix("")

    def notes(self, parent: etree._Element) -> None:
        """The footnotes in a body, or in a section of it, under their heading."""
        self.flow.gap()
        for element in parent:
            if local_name(element) == "section":
                self.note(element)
            elif local_name(element):
                self.element(element)

    def _leads_to_note(self, link: etree._Element) -> bool:
        target = link.get(_HREF) or ""
        return link.get("type") == "note" or (target.startswith("#") and target[1:] in self._note_ids)

    def _note_reference(self, link: etree._Element) -> None:
        text = words_within(link)
        if self._keep_notes and text:
            self.flow.words(_bracketed(text))


def _bracketed(label: str) -> str:
    return label if label.startswith(("[", "{", "(")) else f"[{label}]"


def _without_picture(match: re.Match[bytes]) -> bytes:
    """What stands for a picture: nothing but its line ends. Pictures pass what the XML parser allows one text to hold."""
    return b"<binary/>" + b"\n" * match[0].count(b"\n")


def _text(root: etree._Element, keep_notes: bool) -> str:
    bodies = [element for element in root if local_name(element) == "body"]
    if not bodies:
        raise BadRecordError("the book has no body")
    notes = [body for body in bodies[1:] if body.get("name") in _NOTES]
    note_ids = {element.get("id") or "" for body in notes for element in body.iter("{*}section")}
    text = Fb2Text(frozenset(note_ids), keep_notes)
    for body in bodies:
        if body not in notes:
            text.element(body)
    for body in notes if keep_notes else ():
        text.notes(body)
    return text.flow.text()


def _meta(root: etree._Element) -> dict[str, Any]:
    """Title, authors, language and genres, where the book names them."""
    info = next((element for element in root.iter(etree.Element) if local_name(element) == "title-info"), None)
    if info is None:
        return {}
    texts: dict[str, list[str]] = {"book-title": [], "author": [], "lang": [], "genre": []}
    for element in info:
        name = local_name(element)
        if name in texts:
            text = _person(element) if name == "author" else words_within(element)
            if text:
                texts[name].append(text)
    found = {
        "title": next(iter(texts["book-title"]), ""),
        "authors": texts["author"],
        "language": next(iter(texts["lang"]), ""),
        "genres": texts["genre"],
    }
    return {key: value for key, value in found.items() if value}


def _person(author: etree._Element) -> str:
    """First, middle and last name, or the nickname of one who has no other."""
    parts = {local_name(child): words_within(child) for child in author}
    names = [parts.get(key, "") for key in ("first-name", "middle-name", "last-name")]
    return " ".join(name for name in names if name) or parts.get("nickname", "")
