"""Dialogues to layouts: rendered by a chat template, with who wrote what and what of it is learned.

Most dialogues of a stream have one of a few shapes: the same roles in the same order. What a template makes of a shape is
worked out once, on messages whose texts are left out; a dialogue of that shape is then rendered once, plainly, and must be
what its texts make of the shape. Where it is not, or has tool calls, it is worked out for that dialogue alone. What is
uncertain even then is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from outgrow.recipes.schema.streams import Chat
from outgrow.streaming.render.chat_template import ChatTemplate
from outgrow.streaming.render.layout import Layout, Rendering, lay_out
from outgrow.streaming.render.marks import MarkedMessages, mark, texts_in
from outgrow.streaming.render.specials import Specials
from outgrow.streaming.render.turns import find_turns
from outgrow.streaming.render.unrenderable import LeftOutError, UnrenderableError
from outgrow.streaming.sources.document import Dialogue, Message

Tools: TypeAlias = tuple[dict[str, Any], ...]


_SYSTEM_ROLES = ("system", "developer")
_THINKING = "reasoning_content"
_KEPT_CHARS = 8 * 1024 * 1024
"""What templates made of shapes is kept until the shapes take more characters than this."""


@dataclass(frozen=True)
class Written:
    """A rendered dialogue: a layout and the texts of its fields."""

    layout: Layout
    fields: tuple[str, ...]


class Dialogues:
    """Renders the dialogues of a stream."""

    def __init__(self, template: ChatTemplate, specials: Specials, chat: Chat) -> None:
        self._template = template
        self._specials = specials
        self._chat = chat
        self._knows_thinking = _THINKING in template.source
        self._layouts: dict[tuple[Any, ...], Layout | None] = {}
        self._kept_chars = 0

    def write(self, dialogue: Dialogue, answer: Sequence[Message] | None = None) -> Written:
        """The dialogue, or with ``answer`` the two together, of which the messages of the answer alone are learned.

        Raises ``UnrenderableError``.
        """
        begin = self._with_system(dialogue.messages)
        messages = [self._with_thinking(message) for message in (*begin, *(answer or ()))]
        if not messages:
            raise UnrenderableError("nothing is left of it without its system prompt")
        marked = mark(messages)
        work = _Work(marked, dialogue.tools, 0 if answer is None else len(begin))
        plain = self._template.render(messages, dialogue.tools, num_chars=work.num_chars)
        if not plain:
            raise UnrenderableError("the chat template writes nothing for it")
        fields = tuple([field.text for field in marked.fields])
        layout = self._shared_layout(work) if marked.steady else None
        if layout is not None and layout.text(fields) == plain:
            return Written(layout, fields)
        return Written(self._own_layout(messages, work, plain), ())

    def _with_system(self, messages: Sequence[Message]) -> list[Message]:
        kept = [message for message in messages if self._chat.system == "keep" or message["role"] not in _SYSTEM_ROLES]
        if self._chat.add_system and not any(message["role"] in _SYSTEM_ROLES for message in kept):
            return [{"role": "system", "content": self._chat.add_system}, *kept]
        return kept

    def _with_thinking(self, message: Message) -> Message:
        """The message with its thinking between tags in its content, where the template does not write it by itself."""
        if self._knows_thinking or not message.get(_THINKING):
            return message
        rest = {key: value for key, value in message.items() if key != _THINKING}
        return {**rest, "content": f"<think>\n{message[_THINKING]}\n</think>\n\n{message['content']}"}

    def _shared_layout(self, work: _Work) -> Layout | None:
        """What the template makes of all dialogues of this shape, None where that cannot be said."""
        key = (tuple(work.marked.keys), work.tools_key, work.first)
        if key not in self._layouts:
            try:
                layout = self._layout(work.marked.messages, work, shared=True)
            except UnrenderableError:
                layout = None
            if self._kept_chars > _KEPT_CHARS:
                self._layouts.clear()
                self._kept_chars = 0
            self._layouts[key] = layout
            self._kept_chars += sum(len(text) for part in work.marked.keys for text in part) + len(work.tools_key)
        return self._layouts[key]

    def _own_layout(self, messages: Sequence[Message], work: _Work, plain: str) -> Layout:
        """What the template makes of this dialogue, which is ``plain``; with marks in all messages, else in those that are
        learned alone, for a template may look into what others hold. Raises ``UnrenderableError``."""
        problem: UnrenderableError | None = None
        for roles in (None, frozenset(self._chat.roles)):
            marked = work.marked if roles is None else mark(messages, roles)
            try:
                layout = self._layout(marked.filled(), _Work(marked, work.tools, work.first), shared=False)
            except LeftOutError:
                raise
            except UnrenderableError as error:
                problem = problem or error
                continue
            if layout.text(()) == plain:
                return layout
            problem = problem or UnrenderableError("the chat template looks into what messages hold and writes it otherwise")
        assert problem is not None
        raise problem

    def _layout(self, messages: Sequence[Message], work: _Work, *, shared: bool) -> Layout:
        for text in work.unmarked():
            if (token := self._specials.spelled_in(text)) is not None:
                raise UnrenderableError(f"it spells the special token {token!r} outside of what messages hold")

        def prefixes(count: int, *, prompt: bool) -> str:
            return self._marked(messages[:count], work, work.tools, prompt=prompt)

        rendering = Rendering(self._marked(messages, work, work.tools), self._specials)
        if work.tools and self._writes_alike_without_tools(messages, work, rendering.text):
            raise UnrenderableError("the chat template leaves out the functions that may be called (tools)")
        turns = find_turns(rendering, messages, work.marked.fields, prefixes, self._chat, work.first)
        return lay_out(rendering, turns.regions, turns.borders, shared=shared)

    def _writes_alike_without_tools(self, messages: Sequence[Message], work: _Work, text: str) -> bool:
        try:
            return self._marked(messages, work, ()) == text
        except UnrenderableError:
            return False

    def _marked(self, messages: Sequence[Message], work: _Work, tools: Tools, *, prompt: bool = False) -> str:
        return self._template.render(messages, tools, num_chars=work.num_chars, prompt=prompt, marked=True)


class _Work:
    """Messages whose texts are taken out, the tools beside them, and the first message that may be learned."""

    def __init__(self, marked: MarkedMessages, tools: Tools, first: int) -> None:
        self.marked = marked
        self.tools = tools
        self.first = first
        self.tools_key = json.dumps(tools) if tools else ""
        self.num_chars = sum(len(field.text) + 8 for field in marked.fields) + sum(map(len, self.unmarked()))

    def unmarked(self) -> Iterator[str]:
        """Texts that stand in the rendering without marks."""
        yield from self.marked.unmarked
        yield from texts_in(self.tools)
