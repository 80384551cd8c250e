"""Jinja chat templates as transformers runs them: the same names and filters, in a sandbox, with bounded output.

``strftime_now`` tells the day that the recipe gives, so that the same data always make the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from outgrow.errors import DataError
from outgrow.streaming.render.marks import GENERATION_END, GENERATION_START
from outgrow.streaming.render.unrenderable import UnrenderableError

_ADDED_CHARS = 1_000_000
_TIMES_INPUT = 8
"""A template writes at most this many times the characters it was given, and ``_ADDED_CHARS``."""
_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled template. ``tokens`` are those that the tokenizer names (``bos_token``); ``date`` is year-month-day."""

    def __init__(self, source: str, tokens: Mapping[str, Any], date: str) -> None:
        """Raises ``DataError`` where it is no Jinja template."""
        self.source = source
        self._environment = _Sandbox(date)
        self._tokens = dict(tokens)
        try:
            self._template = self._environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"the chat template is no Jinja template: line {error.lineno}: {error.message}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        num_chars: int,
        prompt: bool = False,
        marked: bool = False,
    ) -> str:
        """The text of messages, with ``prompt`` that of the prompt for an answer to them.

        ``num_chars`` is the length of what is given. With ``marked``, marks stand around what ``{% generation %}`` encloses.
        Raises ``UnrenderableError``.
        """
        variables = {
            **self._tokens,
            "messages": list(messages),
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": prompt,
        }
        self._environment.marks_generation = marked
        try:
            return _joined(self._template, variables, _TIMES_INPUT * num_chars + _ADDED_CHARS)
        except UnrenderableError:
            raise
        except Exception as error:  # a template may run into anything
            reason = (
                error.message
                if isinstance(error, jinja2.TemplateError) and error.message
                else f"{type(error).__name__}: {error}"
            )
            raise UnrenderableError(f"the chat template refuses it: {reason}") from None


def _joined(template: jinja2.Template, variables: dict[str, Any], limit: int) -> str:
    parts: list[str] = []
    num_chars = 0
    for part in template.root_render_func(template.new_context(variables)):
        num_chars += len(part)
        if num_chars > limit:
            raise UnrenderableError(f"the chat template writes more than {limit:,} characters for it")
        parts.append(part)
    return "".join(parts)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Where templates run: they change nothing that they are given, reach nothing else, and loop over short ranges alone."""

    def __init__(self, date: str) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=_Undefined,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        day = datetime.strptime(date, "%Y-%m-%d")
        self.marks_generation = False
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = lambda form: day.strftime(form)


class _Undefined(jinja2.Undefined):
    """What is not there prints as nothing, but for the named tokens: a text without its ``bos_token`` is not what was asked
    for."""

    __slots__ = ()

    def __str__(self) -> str:
        if self._undefined_name in _TOKENS:
            raise jinja2.TemplateRuntimeError(f"it writes {self._undefined_name}, which the tokenizer does not have")
        return super().__str__()


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: what it encloses is what the model writes."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        if self.environment.marks_generation:  # type: ignore[attr-defined]
            return GENERATION_START + caller() + GENERATION_END
        return caller()


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it: letters as they are, nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
