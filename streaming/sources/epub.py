"""Source ``epub``: books, each one document; the chapters in the order of the book's spine, without its table of contents."""

from __future__ import annotations

import posixpath
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lxml import etree

from outgrow.recipes.schema.sources import EpubSource
from outgrow.streaming.sources.archive import Archive
from outgrow.streaming.sources.document import BadRecordError, Document
from outgrow.streaming.sources.flow import MarkupText
from outgrow.streaming.sources.xml_tree import local_name, parse_xml, text_within, words_within

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_EPUB_TYPE = "{http://www.idpf.org/2007/ops}type"
_NOTE_REFERENCES = frozenset({"noteref", "doc-noteref", "footnote-ref"})
_NUMBER = re.compile(r"\d{1,4}|\*{1,3}")
_ARROWS = ("\u21a9", "\u21b5", "\u2191")
_ARROW_STYLES = "\ufe0e\ufe0f"
_CHAPTERS = ("application/xhtml+xml", "text/html")
_PICTURES = ("image/", "audio/", "video/")


@dataclass(frozen=True, kw_only=True)
class EpubReader:
    """A book a file."""

    def read(self, path: Path, name: str) -> Iterator[Document]:
        with Archive(path) as archive:
            package_name = _package_name(archive)
            package = parse_xml(archive.read(package_name), package_name)
            text = XhtmlText()
            for chapter in _chapters(archive, package, package_name):
                text.chapter(parse_xml(archive.read(chapter), chapter))
            yield Document(content=text.flow.text(), source=name, meta=_meta(package))


def reader(source: EpubSource) -> EpubReader:
    """How files of the source are read."""
    return EpubReader()


class XhtmlText(MarkupText):
    """The text of XHTML: blocks are lines, headings stand free, items of lists have their mark, tabs divide cells."""

    _SILENT = frozenset({"head", "script", "style", "template", "nav", "annotation", "annotation-xml"})
    _LINES = frozenset(
        {"p", "div", "dt", "dd", "dl", "address", "figcaption", "caption", "summary", "details", "center", "form", "fieldset"}
        | {"thead", "tbody", "tfoot", "main", "header", "footer", "figure", "legend", "body", "html"}
    )
    _APART = frozenset({"h1", "h2", "h3", "h4", "h5", "h6", "section", "article", "aside", "blockquote", "table", "hgroup"})

    def __init__(self) -> None:
        super().__init__()
        self._lists: list[int | None] = []  # of each list that we are in, the number of its next item; None: it has no numbers

    def chapter(self, root: etree._Element) -> None:
        """Adds a file of the book."""
        self.flow.gap()
        self.element(root)
        self.flow.gap()

    def element(self, element: etree._Element) -> None:
        tag = local_name(element)
        if tag in self._SILENT:
            return
        match tag:
            case "br":
                self.flow.line_break()
            case "hr":
                self.flow.gap()
            case "pre":
                self.flow.gap()
                self.flow.verbatim(text_within(element).strip("\n"))
                self.flow.gap()
            case "ul" | "ol":
                self._list(element, tag)
            case "li":
                self._item(element)
            case "tr":
                self.row([child for child in element if local_name(child) in ("td", "th")])
            case "a":
                self._link(element)
            case _ if tag in self._LINES:
                self.flow.end_line()
                self.inside(element)
                self.flow.end_line()
            case _ if tag in self._APART:
                self.flow.gap()
                self.inside(element)
                self.flow.gap()
            case _:
                self.inside(element)

    def _list(self, element: etree._Element, tag: str) -> None:
        self.flow.end_line()
        start = element.get("start") or "1"
        self._lists.append((int(start) if start.isdecimal() and len(start) < 10 else 1) if tag == "ol" else None)
        self.inside(element)
        self._lists.pop()
        self.flow.end_line()

    def _item(self, element: etree._Element) -> None:
        self.flow.end_line()
        number = self._lists[-1] if self._lists else None
        self.flow.prefix("  " * (len(self._lists) - 1) + ("- " if number is None else f"{number}. "))
        if number is not None:
            self._lists[-1] = number + 1
        self.inside(element)
        self.flow.end_line()
        self.flow.prefix("")

    def _link(self, element: etree._Element) -> None:
        """The words of a link.

        The number of a footnote stands in brackets, since it would grow onto the word that print raises it from; the arrow
        that leads back from the note goes.
        """
        text = text_within(element).strip()
        if element.get("role") == "doc-backlink" or text.rstrip(_ARROW_STYLES) in _ARROWS:
            return
        if _NUMBER.fullmatch(text) and self._is_raised(element):
            self.flow.words(f"[{text}]")
        else:
            self.inside(element)

    def _is_raised(self, element: etree._Element) -> bool:
        parent = element.getparent()
        if parent is not None and local_name(parent) == "sup":
            return True
        words = f"{element.get(_EPUB_TYPE)} {element.get('role')} {element.get('class')}".split()
        return not _NOTE_REFERENCES.isdisjoint(words) or any(local_name(child) == "sup" for child in element)


def _package_name(archive: Archive) -> str:
    """The file that lists what the book consists of."""
    container = parse_xml(archive.read(_CONTAINER), _CONTAINER)
    for element in container.iter(etree.Element):
        if local_name(element) == "rootfile" and (name := element.get("full-path")):
            return name
    raise BadRecordError(f"{_CONTAINER} names no package file")


def _chapters(archive: Archive, package: etree._Element, package_name: str) -> Iterator[str]:
    """Names of the files of the spine, in order. Raises ``BadRecordError`` for those that are protected or of another kind."""
    items = {element.get("id"): element for element in package.iter(etree.Element) if local_name(element) == "item"}
    protected = _protected(archive)
    references = [element.get("idref") or "" for element in package.iter(etree.Element) if local_name(element) == "itemref"]
    if not references:
        raise BadRecordError(f"{package_name}: the spine names no chapter")
    for reference in references:
        item = items.get(reference)
        if item is None:
            raise BadRecordError(f"{package_name}: the spine names '{reference}', which the manifest does not list")
        href, media = item.get("href") or "", item.get("media-type") or "unknown"
        if media.startswith(_PICTURES) or "nav" in (item.get("properties") or "").split():
            continue
        chapter = _resolved(package_name, href)
        if media not in _CHAPTERS:
            raise BadRecordError(f"{chapter} is of type {media}; allowed in the spine: {', '.join(_CHAPTERS)}")
        if chapter in protected:
            raise BadRecordError(f"{chapter} is encrypted (copy protection)")
        yield chapter


def _resolved(package_name: str, href: str) -> str:
    """The archive's name for a link of the package file."""
    path = urllib.parse.unquote(href.partition("#")[0])
    return posixpath.normpath(posixpath.join(posixpath.dirname(package_name), path))


def _protected(archive: Archive) -> set[str]:
    """Names of files that are encrypted (fonts often are, in books that can be read all the same)."""
    if _ENCRYPTION not in archive.names:
        return set()
    root = parse_xml(archive.read(_ENCRYPTION), _ENCRYPTION)
    return {
        urllib.parse.unquote(element.get("URI") or "")
        for element in root.iter(etree.Element)
        if local_name(element) == "CipherReference"
    }


def _meta(package: etree._Element) -> dict[str, Any]:
    """Title, authors and language, where the book names them."""
    texts: dict[str, list[str]] = {"title": [], "creator": [], "language": []}
    for metadata in (element for element in package if local_name(element) == "metadata"):
        for element in metadata.iter(etree.Element):
            text = words_within(element)
            if text and local_name(element) in texts:
                texts[local_name(element)].append(text)
    meta: dict[str, Any] = {}
    if texts["title"]:
        meta["title"] = texts["title"][0]
    if texts["creator"]:
        meta["authors"] = texts["creator"]
    if texts["language"]:
        meta["language"] = texts["language"][0]
    return meta
