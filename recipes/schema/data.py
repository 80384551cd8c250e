"""``data``: streams of documents, the tokenizer, and how documents become rows."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from outgrow.recipes.schema.section import Custom, Section, SourceName

OnError = Literal["stop", "skip"]


class TextSource(Section):
    """Text files: each file is one document."""

    kind: Literal["text"]
    path: SourceName
    """A name that the site maps to a folder, or a file or folder relative to the recipe."""
    include: tuple[str, ...] = ("**/*.txt", "**/*.md", "**/*.py", "**/*.rst")
    """Glob patterns below the folder, relative to it."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of files to leave out."""
    encoding: str = "auto"
    """A Python codec name, or ``auto``: UTF-8 or a byte order mark, else detected; what stays in doubt is refused by name."""
    on_error: OnError = "stop"
    """What a file that cannot be decoded does: ``stop`` the build, or ``skip`` the file and count it."""


class JsonlSource(Section):
    """JSON lines, plain or compressed (.gz, .zst): each line is one document."""

    kind: Literal["jsonl"]
    path: SourceName
    """A name that the site maps to a folder, or a file or folder relative to the recipe."""
    include: tuple[str, ...] = ("**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.zst")
    """Glob patterns below the folder, relative to it."""
    exclude: tuple[str, ...] = ()
    """Glob patterns of files to leave out."""
    text_field: str = "text"
    """The key whose value is the text; the other keys stay as metadata."""
    on_error: OnError = "stop"
    """What a line that is no JSON object, or lacks the text, does: ``stop`` the build, or ``skip`` the line and count it."""


class MdsSource(Section):
    """MDS shards that MosaicML's MDSWriter wrote with token ids (llm-foundry): each sample is one document."""

    kind: Literal["mds"]
    path: SourceName
    """A name that the site maps to a folder, or a folder relative to the recipe; holds ``index.json``."""
    column: str = "tokens"
    """The column of token ids: an ``ndarray`` of integers, or ``bytes`` of int64 as older llm-foundry wrote them."""


class CustomSource(Custom):
    """A function of yours: called with ``options``, it yields documents (``outgrow.streaming.sources.Document``)."""


Source = Annotated[TextSource | JsonlSource | MdsSource | CustomSource, Field(discriminator="kind")]


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer trained on the streams."""

    kind: Literal["train"]
    vocab_size: int = Field(ge=260, le=1_000_000)
    """Tokens in the vocabulary: 256 bytes, the end-of-text token, and merges."""
    sample_bytes: int = Field(default=100_000_000, ge=1_000)
    """At most this many bytes of text are sampled to train it, spread over all streams by size."""


class FolderTokenizer(Section):
    """A tokenizer in a local folder that holds ``tokenizer.json`` (a Hugging Face model folder will do)."""

    kind: Literal["folder"]
    path: SourceName
    """A name that the site maps to a folder, or a folder relative to the recipe."""


Tokenizer = Annotated[TrainTokenizer | FolderTokenizer, Field(discriminator="kind")]


class Stream(Section):
    """One kind of text, counted and validated on its own."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")
    """Lower-case letters, digits, ``-`` and ``_``."""
    source: Source
    """Where its documents come from."""


class Data(Section):
    """What is learned from."""

    sequence_length: int = Field(ge=8, le=1_048_576)
    """Tokens a row."""
    tokenizer: Tokenizer
    """A tokenizer of your own, or one trained on the streams."""
    streams: tuple[Stream, ...] = Field(min_length=1)
    """At least one; documents of all streams are mixed evenly over an epoch."""
    validation_fraction: float = Field(default=0.01, ge=0.0, lt=0.5)
    """Share of the documents, chosen by the digest of their content, that is held out and never trained on; 0 for none."""
    compression: Literal["none", "zstd"] = "none"
    """Compression of the shards in the token store."""
    shard_bytes: int = Field(default=64 * 1024 * 1024, ge=64 * 1024, le=1024 * 1024 * 1024)
    """Size of a shard before compression, bytes."""
    window_shards: int = Field(default=16, ge=1)
    """Documents are shuffled and packed within windows of this many neighbouring shards, so that slow tiers can stream."""
    loader_workers: int = Field(default=1, ge=0, le=64)
    """Processes a rank that read and pack ahead; 0 reads in the training process."""
