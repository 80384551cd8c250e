"""``data.streams[]``: how the documents of a stream are cleaned, chosen, rendered, laid into rows and mixed with others."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from outgrow.recipes.schema.section import Custom, Section, SourceName
from outgrow.recipes.schema.sources import MdsSource, PreferenceShape, Source

# --- cleaning ---------------------------------------------------------------------------------------------------------


class Nfc(Section):
    """Unicode normal form C: letters and their accents become one character."""

    kind: Literal["nfc"]


class ControlCharacters(Section):
    """Control, zero-width and other invisible characters go; line ends become ``\\n``, odd spaces a space."""

    kind: Literal["control_characters"]


class Hyphenation(Section):
    """Words that OCR or a PDF divided at the end of a line are joined again; soft hyphens go."""

    kind: Literal["hyphenation"]


class LineJoins(Section):
    """Lines that OCR or a PDF broke within a paragraph are joined; empty lines and short last lines still end paragraphs."""

    kind: Literal["line_joins"]


class FillerWords(Section):
    """Filler words of speech go, with the commas around them."""

    kind: Literal["filler_words"]
    words: tuple[str, ...] = ("э", "ээ", "эээ", "м", "мм", "ммм", "uh", "um", "uhm", "erm", "hmm")
    """Words to leave out, whatever their case."""


class TimeCodes(Section):
    """Time codes such as ``[00:01:02.300]``, ``00:01:02 -->`` and ``(1:02)`` go."""

    kind: Literal["time_codes"]


class LookAlikes(Section):
    """Latin letters within Cyrillic words, and Cyrillic ones within Latin words, become the letters they look like."""

    kind: Literal["look_alikes"]


class CustomClean(Custom):
    """A function of yours: ``factory(text, **options)`` returns the cleaned text."""


CleanStep = Annotated[
    Nfc | ControlCharacters | Hyphenation | LineJoins | FillerWords | TimeCodes | LookAlikes | CustomClean,
    Field(discriminator="kind"),
]


# --- choosing ---------------------------------------------------------------------------------------------------------


class Filter(Section):
    """Which documents are trained and validated on, after cleaning; every other is counted and listed."""

    min_chars: int = Field(default=0, ge=0)
    """Fewest characters of a document (of a dialogue: of all its messages)."""
    max_chars: int = Field(default=0, ge=0)
    """Most characters of a document; 0 for no limit."""
    languages: tuple[str, ...] = ()
    """Languages to keep, as ISO 639-1 codes of two letters (``ru``, ``en``); empty keeps all."""

    def rules(self) -> Iterator[tuple[str, str]]:
        for index, code in enumerate(self.languages):
            if not re.fullmatch("[a-z]{2}", code):
                yield f"languages[{index}]", f"given '{code}'; allowed: ISO 639-1 codes of two lower-case letters, such as ru"
        if self.max_chars and self.max_chars < self.min_chars:
            yield "max_chars", f"{self.max_chars} is less than min_chars ({self.min_chars}); raise it, or set 0 for no limit"


# --- dialogues --------------------------------------------------------------------------------------------------------


class TokenizerTemplate(Section):
    """The chat template that lies in the tokenizer's folder."""

    kind: Literal["tokenizer"] = "tokenizer"


class NamedTemplate(Section):
    """A chat template that outgrow knows; tokens that it needs are added to the tokenizer."""

    kind: Literal["named"]
    name: Literal["chatml", "llama3", "mistral", "saiga"]
    """``chatml`` (Qwen and others), ``llama3``, ``mistral`` (``[INST]``), ``saiga`` (``<s>role``, then the text)."""


class FileTemplate(Section):
    """A Jinja chat template of your own; it may begin with ``{#- special tokens: <|a|> <|b|> -#}``, which are added to the
    tokenizer."""

    kind: Literal["file"]
    path: SourceName
    """A name that the site maps to the file, or the file relative to the recipe."""


Template = Annotated[TokenizerTemplate | NamedTemplate | FileTemplate, Field(discriminator="kind")]


class Chat(Section):
    """How dialogues and preference pairs become tokens, and which of them are learned."""

    template: Template = TokenizerTemplate()
    """The Jinja template; it runs in a sandbox."""
    roles: tuple[str, ...] = Field(default=("assistant",), min_length=1)
    """Roles whose turns are learned, each with the token that ends it; all else has loss weight 0."""
    answers: Literal["all", "last"] = "all"
    """Whether ``all`` turns of these roles are learned, or the ``last`` one of each dialogue."""
    thinking_weight: float = Field(default=1.0, ge=0)
    """Loss weight of thinking sections, where an answer has weight 1; 0 does not learn them."""
    system: Literal["keep", "drop"] = "keep"
    """What becomes of the system prompts that are there."""
    add_system: str = ""
    """System prompt of dialogues that have none; empty for none."""
    date: str = Field(default="2024-07-26", pattern=r"^\d{4}-\d{2}-\d{2}$")
    """The day that templates which ask for the date are told, as year-month-day; so the same data give the same tokens."""


# --- streams ----------------------------------------------------------------------------------------------------------


class Stream(Section):
    """One kind of text, counted and validated on its own."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    """Lower-case letters, digits, ``-`` and ``_``."""
    source: Source
    """Where its documents come from."""
    use: Literal["training", "validation"] = "training"
    """``validation``: none of its documents is trained on, and its loss is reported by itself: a general set that shows what is
    forgotten meanwhile. A copy of one of them in another stream is not trained on either."""
    clean: tuple[CleanStep, ...] = ()
    """Steps in the order in which they are done (``[nfc, line_joins]``); what each changed is counted."""
    filter: Filter = Filter()
    """Which documents are used."""
    tag: str = Field(default="", pattern=r"^(<[A-Z][A-Z0-9_]{0,30}>)?$")
    """A token that begins every document, such as ``<YAML>``: capitals, digits and ``_`` between angle brackets. It is added
    to the tokenizer where it is not in it; empty for none."""
    chat: Chat = Chat()
    """How dialogues are rendered; texts are not touched by it."""
    order: Literal["shuffled", "sequential"] = "shuffled"
    """``shuffled``: documents are drawn anew within each window; ``sequential``: rows and the documents in them stay in the
    order of the source."""
    split: Literal["anywhere", "never"] = "anywhere"
    """``anywhere``: rows are full, and a document that a row's end divides goes on in the next, cut at the end of a sentence or
    turn where that wastes little; ``never``: each document lies whole in one row."""
    too_long: Literal["stop", "split", "drop"] = "stop"
    """With ``split: never``, what a document longer than a row does: ``stop`` the build, be ``split`` at the ends of sentences
    or turns into rows, or be dropped, counted and listed."""
    epochs: float | None = Field(default=None, gt=0)
    """How often the stream comes in one epoch of the run; 1 where neither this nor ``share`` is given."""
    share: float | None = Field(default=None, gt=0, le=1)
    """Share of all tokens of an epoch that comes from this stream, as often as that takes (replay of general text)."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.epochs is not None and self.share is not None:
            yield "share", "given beside epochs; allowed: one of epochs and share"
        elif self.use == "validation" and (self.epochs is not None or self.share is not None):
            yield "share" if self.share is not None else "epochs", "a stream for validation is not trained on; remove it"
        if isinstance(getattr(self.source, "shape", None), PreferenceShape):
            if self.split != "never":
                yield "split", "a preference pair stays in one row; set split: never"
            if self.too_long == "split":
                yield "too_long", "a preference pair cannot be split; allowed: stop, drop"
        if isinstance(self.source, MdsSource) and (self.clean or self.tag or self.filter != Filter()):
            key = "clean" if self.clean else "tag" if self.tag else "filter"
            yield key, "a source of token ids holds no text to work on; remove it"
        if self.too_long != "stop" and self.split != "never":
            yield "too_long", f"{self.too_long} is for split: never; documents are split already"
