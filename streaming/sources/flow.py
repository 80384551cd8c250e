"""The text of a book as it is put together from its markup: a paragraph a line, an empty line where the book makes a pause."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod

from lxml import etree

from outgrow.streaming.sources.document import BadRecordError
from outgrow.streaming.sources.xml_tree import MAX_DEPTH

_SPACES = re.compile(r"[ \t\r\n\f]+")
_PAUSE = re.compile(r"\n{3,}")


class Flow:
    """Lines one after the other: words until a line ends, and gaps that are one empty line however often they are asked for."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._parts: list[str] = []
        self._prefix = ""
        self._gap = False
        self._open = False

    def words(self, text: str | None) -> None:
        """Text of the current line; white space within it and at its borders is one space, as in HTML."""
        if not text:
            return
        text = _SPACES.sub(" ", text)
        if not self._open or (self._parts and self._parts[-1].endswith((" ", "\n"))):
            text = text.lstrip(" ")
        self.verbatim(text)

    def verbatim(self, text: str | None) -> None:
        """Text of the current line as it is."""
        if text:
            self._parts.append(text)
            self._open = True

    def line_break(self) -> None:
        """A new line within the paragraph."""
        if self._open:
            self._parts.append("\n")

    def prefix(self, text: str) -> None:
        """What the next line begins with (the mark of a list's item)."""
        self._prefix = text

    def end_line(self) -> bool:
        """The paragraph ends, where one was begun; False where there was none, or none that holds text."""
        text = _PAUSE.sub("\n\n", "\n".join(line.rstrip() for line in "".join(self._parts).split("\n"))).rstrip()
        self._parts, self._open = [], False
        if not text.strip():
            return False
        if self._gap and self._lines:
            self._lines.append("")
        self._lines.append(self._prefix + text.lstrip(" ") if self._prefix else text)
        self._gap, self._prefix = False, ""
        return True

    def gap(self) -> None:
        """The paragraph ends, and an empty line comes before the next."""
        self.end_line()
        self._gap = True

    def text(self) -> str:
        """All of it, without a line end at its end."""
        self.end_line()
        return "\n".join(self._lines)


class MarkupText(ABC):
    """A tree of elements as text; a kind of book says in ``element`` what each of its elements means."""

    def __init__(self) -> None:
        self.flow = Flow()
        self._depth = 0

    @abstractmethod
    def element(self, element: etree._Element) -> None:
        """Puts what the element holds into ``flow``."""

    def inside(self, element: etree._Element) -> None:
        """The text and the elements within ``element``. Raises ``BadRecordError`` where they are nested too deeply."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise BadRecordError(f"its elements are nested too deeply; at most {MAX_DEPTH} levels")
        self.flow.words(element.text)
        for child in element:
            if isinstance(child.tag, str):
                self.element(child)
            self.flow.words(child.tail)
        self._depth -= 1

    def row(self, cells: list[etree._Element]) -> None:
        """Cells of a table as one line, divided by tabs; a row of one cell is what the cell holds."""
        self.flow.end_line()
        if len(cells) == 1:
            self.inside(cells[0])
        else:
            self.flow.verbatim("\t".join(self._cell(cell) for cell in cells))
        self.flow.end_line()

    def _cell(self, cell: etree._Element) -> str:
        outer, self.flow = self.flow, Flow()
        self.inside(cell)
        text, self.flow = self.flow.text(), outer
        return " ".join(text.split())
