"""A rendering as units to encode: special tokens, and runs of text between them; with the loss weight of every character.

Special tokens stand where the template wrote them and nowhere else. Texts of messages lie in runs as they are, or as numbers of
fields where the layout serves many dialogues of one shape.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from outgrow.streaming.render.marks import Mark, find_marks
from outgrow.streaming.render.specials import Specials, SpecialToken
from outgrow.streaming.render.unrenderable import UnrenderableError


class Region(NamedTuple):
    """Characters of a rendering that have a loss weight other than 0; ``stop`` is the first that has not."""

    start: int
    stop: int
    weight: float


class Token(NamedTuple):
    """A special token; ``begins``: a turn begins with it."""

    token_id: int
    weight: float
    begins: bool


class Section(NamedTuple):
    """Texts, and numbers of fields, whose characters have one weight; ``begins``: a turn begins with it."""

    parts: tuple[str | int, ...]
    weight: float
    begins: bool


class Run(NamedTuple):
    """Text between special tokens. ``after_token`` is false for what begins a rendering."""

    sections: tuple[Section, ...]
    after_token: bool


Unit: TypeAlias = Token | Run


@dataclass(frozen=True)
class Layout:
    """Units in order, and ``written``: all that they hold, special tokens spelled out, as texts and numbers of fields."""

    units: tuple[Unit, ...]
    written: tuple[str | int, ...]

    def text(self, fields: Sequence[str]) -> str:
        """The whole text with fields in their places."""
        return "".join([part if isinstance(part, str) else fields[part] for part in self.written])


class Rendering:
    """A marked rendering taken apart. Raises ``UnrenderableError`` where the template tore marks from what they enclose.

    Positions are those in the text with its marks. ``opened`` and ``closed`` give the first mark before and the last after
    each field that is there; ``generated`` what ``{% generation %}`` encloses; ``specials`` the special tokens that the
    template wrote.
    """

    def __init__(self, text: str, specials: Specials) -> None:
        self.text = text
        self.opened: dict[int, Mark] = {}
        self.closed: dict[int, Mark] = {}
        self.generated: list[tuple[int, int]] = []
        self.runs: list[tuple[int, int, int]] = []
        """Start, stop, and field, -1 for text of the template; in order, without the marks."""
        self.marks = list(find_marks(text))
        self._take_apart()
        self.specials: list[SpecialToken] = []
        for start, stop, field in self.runs:
            if field < 0:
                self.specials += specials.find(text, start, stop)

    def special_from(self, position: int) -> int:
        """Number of the first special token that starts at ``position`` or later."""
        return bisect_right(self.specials, position - 1, key=lambda token: token.start)

    def mark_before(self, position: int) -> int:
        """Where the last mark before ``position`` stops; 0 where there is none."""
        at = bisect_right(self.marks, position, key=lambda mark: mark.stop)
        return self.marks[at - 1].stop if at else 0

    def next_mark(self, position: int) -> int:
        """Where the first mark at ``position`` or later starts; the end of the text where there is none."""
        at = bisect_right(self.marks, position - 1, key=lambda mark: mark.start)
        return self.marks[at].start if at < len(self.marks) else len(self.text)

    def _take_apart(self) -> None:
        inside, since, generation = -1, 0, -1
        for mark in self.marks:
            if mark.field < 0:
                if inside >= 0 or mark.opens != (generation < 0):
                    raise UnrenderableError("the chat template nests its generation blocks, or divides a message with them")
                if not mark.opens:
                    self.generated.append((generation, mark.start))
                generation = mark.stop if mark.opens else -1
            elif mark.opens == (inside >= 0) or (inside >= 0 and mark.field != inside):
                raise UnrenderableError("the chat template cuts up what a message holds")
            self.runs.append((since, mark.start, inside))
            since = mark.stop
            if mark.field >= 0:
                inside = mark.field if mark.opens else -1
                (self.opened.setdefault(mark.field, mark) if mark.opens else self.closed.__setitem__(mark.field, mark))
        if inside >= 0:
            raise UnrenderableError("the chat template cuts off what a message holds")
        self.runs.append((since, len(self.text), -1))


def lay_out(rendering: Rendering, regions: Sequence[Region], turns: Sequence[int], *, shared: bool) -> Layout:
    """The units of a rendering. ``turns`` are positions, ascending, at or before which a turn begins; ``shared``: fields go
    in as their numbers."""
    builder = _Builder(rendering, regions, turns)
    for start, stop, field in rendering.runs:
        if field >= 0:
            builder.add(field if shared else rendering.text[start:stop], start)
            continue
        for token in builder.tokens(start, stop):
            builder.add_text(start, token.start)
            builder.add_token(token)
            start = token.stop
        builder.add_text(start, stop)
    return builder.layout()


class _Builder:
    def __init__(self, rendering: Rendering, regions: Sequence[Region], turns: Sequence[int]) -> None:
        self._rendering = rendering
        self._regions = sorted(regions)
        self._turns = list(turns)
        self._edges = sorted({*turns, *(region.start for region in regions), *(region.stop for region in regions)})
        self._next_turn = 0
        self._units: list[Unit] = []
        self._sections: list[Section] = []
        self._written: list[str | int] = []

    def tokens(self, start: int, stop: int) -> list[SpecialToken]:
        """The special tokens in a run of the template's text."""
        own = self._rendering
        return own.specials[own.special_from(start) : own.special_from(stop)]

    def add(self, text: str | int, position: int) -> None:
        """Text of one weight, which stands at ``position``."""
        self._written.append(text)
        weight, begins = self._weight(position), self._begins(position)
        if self._sections and not begins and self._sections[-1].weight == weight:
            last = self._sections.pop()
            self._sections.append(Section((*last.parts, text), weight, last.begins))
        else:
            self._sections.append(Section((text,), weight, begins))

    def add_text(self, start: int, stop: int) -> None:
        """Text of the template, divided where weights change or a turn begins."""
        first, last = bisect_right(self._edges, start), bisect_right(self._edges, stop - 1)
        for edge in (*self._edges[first:last], stop):
            if edge > start:
                self.add(self._rendering.text[start:edge], start)
            start = edge

    def add_token(self, token: SpecialToken) -> None:
        self._end_run()
        self._written.append(self._rendering.text[token.start : token.stop])
        self._units.append(Token(token.token_id, self._weight(token.at), self._begins(token.at)))

    def layout(self) -> Layout:
        self._end_run()
        return Layout(tuple(self._units), tuple(self._written))

    def _end_run(self) -> None:
        if self._sections:
            self._units.append(Run(tuple(self._sections), after_token=bool(self._units)))
        self._sections = []

    def _weight(self, position: int) -> float:
        at = bisect_right(self._regions, position, key=lambda region: region.start) - 1
        return self._regions[at].weight if at >= 0 and position < self._regions[at].stop else 0.0

    def _begins(self, position: int) -> bool:
        before = self._next_turn
        while self._next_turn < len(self._turns) and self._turns[self._next_turn] <= position:
            self._next_turn += 1
        return self._next_turn > before
