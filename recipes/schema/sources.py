"""``data.streams[].source``: where the documents of a stream come from, one section a kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from outgrow.recipes.schema.section import Custom, Section, SourceName

OnError = Literal["stop", "skip", "quarantine"]


# --- shapes of records ------------------------------------------------------------------------------------------------


class TextShape(Section):
    """Each record is a text; its other keys stay as metadata."""

    kind: Literal["text"] = "text"
    field: str = "text"
    """The key whose value is the text."""


class MessagesShape(Section):
    """Each record is a dialogue in OpenAI's form: a list of ``role`` and ``content``, tool calls too. Saiga's ``bot`` counts as
    ``assistant``; a message with ``weight: 0`` is not learned."""

    kind: Literal["messages"]
    field: str = "messages"
    """The key whose value is the list; ``tools`` beside it lists the functions that may be called."""


class ShareGptShape(Section):
    """Each record is a dialogue in ShareGPT's form: a list of ``from`` and ``value``."""

    kind: Literal["sharegpt"]
    field: str = "conversations"
    """The key whose value is the list; ``system`` beside it is the system prompt."""


class AlpacaShape(Section):
    """Each record is one question and answer in Alpaca's form; ``input``, where there is one, follows the instruction."""

    kind: Literal["alpaca"]
    instruction: str = "instruction"
    """The key of the question."""
    input: str = "input"
    """The key of what the question is about; it may be missing or empty."""
    output: str = "output"
    """The key of the answer."""


class PreferenceShape(Section):
    """Each record is a preference pair: a prompt, the chosen and the rejected answer; texts or lists of messages."""

    kind: Literal["preference"]
    prompt: str = "prompt"
    """The key of the prompt; where it is missing, ``chosen`` and ``rejected`` are whole dialogues that begin alike."""
    chosen: str = "chosen"
    """The key of the better answer."""
    rejected: str = "rejected"
    """The key of the worse answer."""


Shape = Annotated[TextShape | MessagesShape | ShareGptShape | AlpacaShape | PreferenceShape, Field(discriminator="kind")]


# --- sources ----------------------------------------------------------------------------------------------------------


class FileSource(Section):
    """What all kinds that read files have in common."""

    path: SourceName
    """A name that the site maps to a folder, or a file or folder relative to the recipe."""
    include: tuple[str, ...] = ("**/*",)
    """Glob patterns below the folder, relative to it."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of files to leave out."""
    on_error: OnError = "stop"
    """What a file or record that does not fit does: ``stop`` the build, ``skip`` it, or ``quarantine`` it: skip it and keep
    what it holds for ``outgrow data dropped``. Every one is counted and listed."""


class _Encoded(FileSource):
    encoding: str = "auto"
    """A Python codec name, or ``auto``: UTF-8 or a byte order mark, else detected; what stays in doubt is refused by name."""


class TextSource(_Encoded):
    """Text files: each file is one document."""

    kind: Literal["text"]
    include: tuple[str, ...] = ("**/*.txt", "**/*.md", "**/*.py", "**/*.rst")
    """Glob patterns below the folder, relative to it."""


class MarkdownSource(_Encoded):
    """Markdown files: each file is one document; YAML front matter becomes metadata."""

    kind: Literal["markdown"]
    include: tuple[str, ...] = ("**/*.md", "**/*.markdown")
    """Glob patterns below the folder, relative to it."""


class JsonlSource(FileSource):
    """JSON lines, plain or compressed (.gz, .zst): each line is one record."""

    kind: Literal["jsonl"]
    include: tuple[str, ...] = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst")
    """Glob patterns below the folder, relative to it."""
    shape: Shape = TextShape()
    """What a record is."""


class JsonSource(FileSource):
    """JSON files: a list of records, an object that holds such a list, or one record."""

    kind: Literal["json"]
    include: tuple[str, ...] = ("**/*.json",)
    """Glob patterns below the folder, relative to it."""
    shape: Shape = TextShape()
    """What a record is."""
    records: str = ""
    """The key that holds the list of records, ``a.b`` for one within another; empty: the file is the list, or one record."""


class ParquetSource(FileSource):
    """Parquet files: each row is one record."""

    kind: Literal["parquet"]
    include: tuple[str, ...] = ("**/*.parquet",)
    """Glob patterns below the folder, relative to it."""
    shape: Shape = TextShape()
    """What a record is."""


class EpubSource(FileSource):
    """EPUB books: each book is one document; title, authors and language become metadata."""

    kind: Literal["epub"]
    include: tuple[str, ...] = ("**/*.epub",)
    """Glob patterns below the folder, relative to it."""


class Fb2Source(FileSource):
    """FictionBook books (.fb2, .fb2.zip): each book is one document; title, authors and language become metadata."""

    kind: Literal["fb2"]
    include: tuple[str, ...] = ("**/*.fb2", "**/*.fb2.zip")
    """Glob patterns below the folder, relative to it."""
    notes: Literal["keep", "drop"] = "keep"
    """Footnotes: ``keep`` them at the end of the book, or ``drop`` them."""


class DocxSource(FileSource):
    """Word documents (.docx): each file is one document; tables become lines of cells divided by tabs."""

    kind: Literal["docx"]
    include: tuple[str, ...] = ("**/*.docx",)
    """Glob patterns below the folder, relative to it."""


class PdfSource(FileSource):
    """The text of PDF files: each file is one document. A scan without text is refused by name."""

    kind: Literal["pdf"]
    include: tuple[str, ...] = ("**/*.pdf",)
    """Glob patterns below the folder, relative to it."""


class TranscriptSource(_Encoded):
    """Subtitles and transcripts (.srt, .vtt, Whisper's .json): each file is one document, a line a cue.

    Times and speakers stay as metadata (``cues``: a list of start and end in seconds, and speaker).
    """

    kind: Literal["transcript"]
    include: tuple[str, ...] = ("**/*.srt", "**/*.vtt", "**/*.json")
    """Glob patterns below the folder, relative to it."""
    speakers: Literal["keep", "drop"] = "keep"
    """``keep``: a line begins with its speaker where one is named and changes; ``drop``: the words alone."""
    times: Literal["keep", "drop"] = "drop"
    """``keep``: each line begins with its time code, ``[00:01:02]``; ``drop``: the words alone."""


class YamlSource(_Encoded):
    """YAML files of any structure (scenes): each YAML document is one document, rendered as fenced YAML."""

    kind: Literal["yaml"]
    include: tuple[str, ...] = ("**/*.yaml", "**/*.yml")
    """Glob patterns below the folder, relative to it."""
    records: str = ""
    """The key that holds a list of which each item is a document, ``a.b`` for one within another; empty: the whole is one."""
    fence: bool = True
    """Whether the text stands between lines of three backquotes."""
    keep: tuple[str, ...] = ()
    """Top-level keys whose values stay as metadata too."""


class MdsSource(Section):
    """MDS shards that MosaicML's MDSWriter wrote with token ids (llm-foundry): each sample is one document."""

    kind: Literal["mds"]
    path: SourceName
    """A name that the site maps to a folder, or a folder relative to the recipe; holds ``index.json``."""
    column: str = "tokens"
    """The column of token ids: an ``ndarray`` of integers, or ``bytes`` of int64 as older llm-foundry wrote them."""


class CustomSource(Custom):
    """A function of yours: called with ``options``, it yields documents (``outgrow.streaming.sources.Document``)."""


Source = Annotated[
    TextSource
    | MarkdownSource
    | JsonlSource
    | JsonSource
    | ParquetSource
    | EpubSource
    | Fb2Source
    | DocxSource
    | PdfSource
    | TranscriptSource
    | YamlSource
    | MdsSource
    | CustomSource,
    Field(discriminator="kind"),
]
