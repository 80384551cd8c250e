"""Which characters of a rendered dialogue are learned: what the model has to write at inference, no more and no less.

An answer begins where the prompt for it ends: the rendering of the messages before it with ``add_generation_prompt``, which
the whole rendering must begin with. It ends with the token that ends the turn: the first special token that the template wrote
after what the message holds, and those that follow it without a gap. How far the template's text still belongs to the message
is seen in the rendering that ends with it; where there is no special token in that, the one that begins the next turn ends this
one. Where a template has ``{% generation %}`` blocks, they say what answers are.

Templates write turn after turn alike, so a turn that stands among the same words as an earlier one, after a message of the same
kind, is taken to begin and end as that did; the last answer is looked up in any case, and with it all that stands before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Protocol, TypeAlias

from outgrow.recipes.schema.streams import Chat
from outgrow.streaming.render.layout import Region, Rendering
from outgrow.streaming.render.marks import Field, Mark
from outgrow.streaming.render.unrenderable import LeftOutError, UnrenderableError
from outgrow.streaming.sources.document import Message

ANSWERS = "assistant"
"""The role whose turns the model writes after a prompt."""

_END_TAG = re.compile(r"\s*(?:<[^<>]*>|\[[^\[\]]*\])(?:\r?\n){0,2}")
"""What ends thinking: white space, a tag in angle or square brackets, and at most a blank line."""
_BLANK = re.compile("(?:\\s|[\ud802\ud803][\udc00-\udfff]{2})*")
"""White space, and the marks of generation blocks."""


class Prefixes(Protocol):
    """Marked renderings of the first messages of a dialogue."""

    def __call__(self, count: int, *, prompt: bool) -> str:
        """The first ``count`` messages, with ``prompt`` and the prompt for an answer. Raises ``UnrenderableError``."""


@dataclass(frozen=True)
class Turns:
    """``regions`` that are learned, in order, and positions at which a turn begins, ascending."""

    regions: tuple[Region, ...]
    borders: tuple[int, ...]


def find_turns(
    rendering: Rendering, messages: Sequence[Message], fields: Sequence[Field], prefixes: Prefixes, chat: Chat, first: int
) -> Turns:
    """The turns of a rendering; only messages from number ``first`` on are learned. Raises ``UnrenderableError``."""
    return _Search(rendering, messages, fields, prefixes, chat).turns(first)


_Surroundings: TypeAlias = tuple[tuple[str, ...], tuple[str, ...], str]
"""Kinds of two messages, and the template's text between them."""


class _Search:
    def __init__(
        self, rendering: Rendering, messages: Sequence[Message], fields: Sequence[Field], prefixes: Prefixes, chat: Chat
    ) -> None:
        self._rendering = rendering
        self._text = rendering.text
        self._messages = messages
        self._prefixes = prefixes
        self._chat = chat
        self._starts: dict[_Surroundings, int] = {}
        self._endings: dict[_Surroundings, int] = {}
        self._fields: list[list[tuple[int, Field]]] = [[] for _ in messages]
        for number, field in enumerate(fields):
            self._fields[field.message].append((number, field))
            if number not in rendering.opened and field.kind != "thinking":
                raise LeftOutError(f"the chat template leaves out what {self._name(field.message)} holds")

    def turns(self, first: int) -> Turns:
        learned = [
            number
            for number, message in enumerate(self._messages)
            if number >= first and message["role"] in self._chat.roles and message.get("weight", 1)
        ]
        learned = learned[-1:] if self._chat.answers == "last" else learned
        self._last = max(learned, default=-1)
        generated = self._generated() if self._rendering.generated else None
        regions: list[Region] = []
        spans: dict[int, tuple[int, int]] = {}
        for message in learned:
            if generated is not None and self._messages[message]["role"] == ANSWERS:
                own = generated.get(message, [])
            else:
                own = self._span(message)
            for start, stop in own:
                regions += self._regions(message, start, stop)
                spans[message] = (start, stop)
        return Turns(tuple(regions), tuple(sorted(self._borders(spans))))

    # --- one message ---

    def _span(self, message: int) -> list[tuple[int, int]]:
        """Where a learned turn begins and ends; nothing for a turn of another role that holds nothing."""
        if self._messages[message]["role"] == ANSWERS:
            start = self._answer_start(message)
        else:
            opened = self._opened(message)
            if not opened:
                return []
            start = min(opened)
        return [(start, self._turn_end(message, start))]

    def _answer_start(self, message: int) -> int:
        opened = min(self._opened(message), default=None)
        around: _Surroundings | None = None
        since = 0
        if opened is not None:
            since = self._rendering.mark_before(opened)
            around = (self._kind(message - 1), self._kind(message), self._text[since:opened])
            if message != self._last and around in self._starts:
                return since + self._starts[around]
        prompt = self._prefixes(message, prompt=True)
        if not self._text.startswith(prompt):
            raise UnrenderableError(
                f"the chat template's prompt for {self._name(message)} is not how it writes the dialogue up to there; "
                f"mark answers in the template by generation blocks"
            )
        if opened is not None and opened < len(prompt):
            raise UnrenderableError(f"the chat template writes a part of {self._name(message)} before the prompt for it ends")
        if around is not None:
            self._starts[around] = len(prompt) - since
        return len(prompt)

    def _turn_end(self, message: int, start: int) -> int:
        """Where the turn ends that began at ``start``."""
        last = max(self._closing(message), key=lambda mark: mark.stop, default=None)
        written = last.stop if last else start
        around = (self._kind(message), self._kind(message + 1), self._text[written : self._rendering.next_mark(written)])
        if last is None or around not in self._endings:
            ending = self._ending(message, start, last)
            self._endings[around] = _common(ending, self._text[written : written + len(ending)])
        limit = written + self._endings[around]
        tokens, at = self._rendering.specials, self._rendering.special_from(written)
        if at < len(tokens) and not self._text[limit : tokens[at].start].strip():
            limit = max(limit, tokens[at].stop)
            while at + 1 < len(tokens) and tokens[at + 1].start == tokens[at].stop and tokens[at + 1].stop <= limit:
                at += 1
            return tokens[at].stop
        return written + len(self._text[written:limit].rstrip())

    def _ending(self, message: int, start: int, last: Mark | None) -> str:
        """What follows a message in the rendering that ends with it: what stands after its ``last`` mark, else after
        ``start``."""
        alone = self._prefixes(message + 1, prompt=False) if message + 1 < len(self._messages) else self._text
        if last is None:
            at = start if alone.startswith(self._text[:start]) else -1
        else:
            mark = self._text[last.start : last.stop]
            at = alone.rfind(mark) + len(mark) if mark in alone else -1
        if at < 0:
            raise UnrenderableError(f"the chat template writes {self._name(message)} otherwise when more messages follow")
        return alone[at:]

    def _kind(self, message: int) -> tuple[str, ...]:
        """The role of a message and what it holds; nothing for none."""
        if not 0 <= message < len(self._messages):
            return ()
        return (self._messages[message]["role"], *dict.fromkeys(field.kind for _, field in self._fields[message]))

    def _regions(self, message: int, start: int, stop: int) -> list[Region]:
        """What is learned of a turn, thinking with its tags by a weight of its own."""
        opened, closed = self._rendering.opened, self._rendering.closed
        thinking = [
            number
            for number, field in self._fields[message]
            if field.kind == "thinking" and number in opened and start <= opened[number].start < stop
        ]
        if not thinking or self._chat.thinking_weight == 1:
            return [Region(start, stop, 1.0)]
        first = opened[thinking[0]].start
        begin = start if first == min(self._opened(message)) else first
        after = closed[thinking[-1]].stop
        tag = _END_TAG.match(self._text, after, min(self._rendering.next_mark(after), self._ending_tokens(stop)))
        end = tag.end() if tag else after
        return [Region(start, begin, 1.0), Region(begin, end, self._chat.thinking_weight), Region(end, stop, 1.0)]

    def _ending_tokens(self, stop: int) -> int:
        """Where the special tokens begin that end a turn at ``stop``; ``stop`` where none does."""
        tokens, at = self._rendering.specials, self._rendering.special_from(stop) - 1
        while at >= 0 and tokens[at].stop == stop:
            stop = tokens[at].start
            at -= 1
        return stop

    def _opened(self, message: int) -> list[int]:
        opened = self._rendering.opened
        return [opened[number].start for number, _ in self._fields[message] if number in opened]

    def _closing(self, message: int) -> list[Mark]:
        closed = self._rendering.closed
        return [closed[number] for number, _ in self._fields[message] if number in closed]

    def _name(self, message: int) -> str:
        return f"message {message + 1} ({self._messages[message]['role']})"

    # --- all messages ---

    def _generated(self) -> dict[int, list[tuple[int, int]]]:
        """What ``{% generation %}`` encloses, by message: that of the texts in it; blocks without any count the answers."""
        spans = self._rendering.generated
        answers = [number for number, message in enumerate(self._messages) if message["role"] == ANSWERS]
        opened = sorted((mark.start, field) for field, mark in self._rendering.opened.items())
        owner = {number: field.message for own in self._fields for number, field in own}
        found: dict[int, list[tuple[int, int]]] = {}
        for at, (start, stop) in enumerate(spans):
            held = next((owner[field] for place, field in opened if start <= place < stop), None)
            if held is None and len(spans) != len(answers):
                raise UnrenderableError("the chat template has generation blocks that hold no message")
            found.setdefault(answers[at] if held is None else held, []).append((start, stop))
        return found

    def _borders(self, learned: dict[int, tuple[int, int]]) -> Iterator[int]:
        """Where a turn begins, after the first; ``learned``: from where to where turns are learned."""
        before: int | None = None
        for message in range(len(self._messages)):
            opened = min(self._opened(message), default=None)
            if opened is None:
                continue
            if before is not None and (written := self._written(before)) <= opened:
                end, start = learned.get(before, (0, written))[1], learned.get(message, (opened, 0))[0]
                yield self._border(written, min(start, opened), end)
            before = message

    def _written(self, message: int) -> int:
        return max(mark.stop for mark in self._closing(message))

    def _border(self, written: int, opened: int, end: int) -> int:
        """Where between two messages the second begins: after the tokens that end the first, white space aside."""
        if not written < end <= opened:
            tokens, at = self._rendering.specials, self._rendering.special_from(written)
            end = tokens[at].stop if at < len(tokens) and tokens[at].stop <= opened else written
        blank = _BLANK.match(self._text, end, opened)
        after = blank.end() if blank else end
        return end if written < end and after == opened else after


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return len(commonprefix([one, other]))
