"""What a file's name tells of it, what a look into it found, and how far such looks go."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pydantic import TypeAdapter

from outgrow.recipes.schema.sources import FileSource, Shape, Source

SAMPLE_BYTES = 1024 * 1024
"""What is read of a file that can be read in part."""
WHOLE_BYTES = 16 * 1024 * 1024
"""Files of other kinds are read up to this size; of larger ones only the name is known."""
MAX_RECORDS = 300
"""Records of one file that are looked at."""
SAMPLE_CHARS = 64 * 1024
"""Text of one file that is looked at for what cleaning would find."""
SHORT_VALUE = 60
"""Characters of a value that may be worth keeping as metadata."""

IN_DOUBT = "in doubt"
"""The encoding of a file whose bytes fit several."""

_CODE = (".py", ".js", ".ts", ".c", ".h", ".cc", ".cpp", ".java", ".go", ".rs", ".rb", ".php", ".cs", ".kt", ".sh", ".sql")
_KINDS = {
    **dict.fromkeys((".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson"), "jsonl"),
    **dict.fromkeys((".srt", ".vtt"), "transcript"),
    **dict.fromkeys((".md", ".markdown"), "markdown"),
    **dict.fromkeys((".yaml", ".yml"), "yaml"),
    **dict.fromkeys((".fb2", ".fb2.zip"), "fb2"),
    **dict.fromkeys((".txt", ".text", ".rst", ".tex", *_CODE), "text"),
    **{f".{kind}": kind for kind in ("json", "parquet", "epub", "docx", "pdf")},
}
ADVICE = {
    **dict.fromkeys((".doc", ".rtf", ".odt"), "save it as .docx"),
    **dict.fromkeys((".mobi", ".azw", ".azw3"), "convert it to .epub"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "convert it to Markdown or text"),
    **dict.fromkeys((".djvu", ".djv"), "convert it to PDF with text, or to text"),
    **dict.fromkeys((".csv", ".tsv", ".arrow", ".feather"), "convert it to .parquet or .jsonl"),
    **dict.fromkeys((".ass", ".ssa", ".sub", ".ttml"), "convert it to .srt"),
    **dict.fromkeys((".zip", ".7z", ".rar", ".tar", ".tgz", ".gz", ".zst", ".bz2", ".xz"), "unpack it"),
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".gif", ".tif", ".tiff", ".webp"), "a picture; make its text by OCR"),
    **dict.fromkeys((".mp3", ".m4a", ".wav", ".ogg", ".flac", ".mp4", ".mkv", ".avi", ".webm"), "speech; transcribe it"),
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one file is. ``kind`` is empty where no kind of source reads it; ``problem`` says why, or why it cannot be read.

    ``records`` is the key of the list of records in a JSON file, ``num_records`` how many were looked at, ``num_fit`` how many
    of them are documents, and ``num_misfits`` how many do not fit and are not merely empty; ``misfit`` is the first of these.
    ``likely_encoding`` is what a file ``IN_DOUBT`` seems to be in; ``facts`` counts what else was seen.
    """

    name: str
    kind: str
    problem: str = ""
    shape: Shape | None = None
    records: str = ""
    num_records: int = 0
    num_fit: int = 0
    num_misfits: int = 0
    misfit: str = ""
    encoding: str = "utf-8"
    likely_encoding: str = ""
    text: str = ""
    facts: Counter[str] = field(default_factory=Counter)


def suffix_of(name: str) -> str:
    """The end of a file's name that tells its kind, as it is written there; empty where it has none."""
    parts = name.rpartition("/")[2].split(".")
    two = "." + ".".join(parts[-2:])
    if len(parts) > 2 and two.lower() in _KINDS:
        return two
    return f".{parts[-1]}" if len(parts) > 1 and parts[-1] else ""


def kind_by_name(name: str) -> str:
    """The kind of source that reads files of such a name, empty where none does."""
    return _KINDS.get(suffix_of(name).lower(), "")


def source_of(kind: str) -> FileSource:
    """The section of a source of that kind with nothing but what it needs."""
    section = TypeAdapter(Source).validate_python({"kind": kind, "path": "files"})
    assert isinstance(section, FileSource), kind
    return section
