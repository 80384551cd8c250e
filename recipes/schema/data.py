"""``data``: streams of documents, the tokenizer, the mix of streams, and how documents become rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from outgrow.recipes.schema.section import Section, SourceName
from outgrow.recipes.schema.streams import Stream

_SHARES_SUM_TO_ONE_WITHIN = 1e-6


class TrainTokenizer(Section):
    """A byte-level BPE tokenizer trained on the streams."""

    kind: Literal["train"]
    vocab_size: int = Field(ge=260, le=1_000_000)
    """Tokens in the vocabulary: 256 bytes, the end-of-text token, and merges; tags and tokens of chat templates come on top."""
    sample_bytes: int = Field(default=100_000_000, ge=1_000)
    """At most this many bytes of text are sampled to train it, spread over all streams by size."""


class FolderTokenizer(Section):
    """A tokenizer in a local folder that holds ``tokenizer.json`` (a Hugging Face model folder will do)."""

    kind: Literal["folder"]
    path: SourceName
    """A name that the site maps to a folder, or a folder relative to the recipe."""


Tokenizer = Annotated[TrainTokenizer | FolderTokenizer, Field(discriminator="kind")]


class Duplicates(Section):
    """Which documents are left out for being like another; each is counted, and listed with the one that it is like.

    The first in the order of streams and sources is kept. A training document that is like a held-out one is left out too; one
    that equals a document of a stream for validation (``use``) is left out whatever is asked for here.
    """

    remove: Literal["none", "exact", "near"] = "none"
    """``exact``: the same text after cleaning; ``near``: also those whose words are alike (MinHash of word 5-grams)."""
    similarity: float = Field(default=0.8, gt=0, lt=1)
    """Jaccard similarity from which two texts are near-duplicates."""
    across: Literal["streams", "stream"] = "streams"
    """Whether documents of all ``streams`` are compared, or those of each ``stream`` by itself; training documents are
    compared with the held-out ones of all streams either way."""


class Stage(Section):
    """A part of the run with a mix of its own."""

    tokens: int | None = Field(default=None, ge=1)
    """How long it lasts: positions of rows, rounded up to whole steps; the last stage has none and lasts to the end."""
    shares: dict[str, Annotated[float, Field(ge=0, le=1)]]
    """Share of the stage's tokens from each stream, by name; together 1. A stream that is not named gives none."""
    sequence_length: int | None = Field(default=None, ge=8, le=1_048_576)
    """Tokens a row in this stage; else ``data.sequence_length``."""

    def rules(self) -> Iterator[tuple[str, str]]:
        total = sum(self.shares.values())
        if abs(total - 1) > _SHARES_SUM_TO_ONE_WITHIN:
            yield "shares", f"they add up to {total:.6g}; allowed: 1"


class Data(Section):
    """What is learned from."""

    sequence_length: int = Field(ge=8, le=1_048_576)
    """Tokens a row."""
    tokenizer: Tokenizer
    """A tokenizer of your own, or one trained on the streams."""
    streams: tuple[Stream, ...] = Field(min_length=1)
    """At least one; every batch holds them in the proportion of the whole epoch or stage."""
    stages: tuple[Stage, ...] = ()
    """Parts of the run with shares, or a length of rows, of their own; none: one mix for the whole run."""
    duplicates: Duplicates = Duplicates()
    """Which documents are left out for being like another."""
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
    on_bad_shard: Literal["stop", "quarantine"] = "stop"
    """What a run does that finds a shard of its training rows whole in no place: ``stop``, or ``quarantine``, which lists every
    row with a token of the shard in the run's folder, starts the ranks again and reads those rows as empty from then on, for
    good; it does so for 16 shards or 1% of all, whichever is more, but never for more than half."""

    def rules(self) -> Iterator[tuple[str, str]]:
        names = [stream.name for stream in self.streams]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield f"streams[{index}].name", f"'{name}' is given twice; each stream needs a name of its own"
        if not self.trained:
            yield "streams[0].use", "no stream is left to train on; allowed: validation beside at least one of training"
        elif self.stages:
            yield from self._stage_rules(names)
        else:
            yield from self._share_rules()

    @property
    def trained(self) -> tuple[Stream, ...]:
        """The streams that are trained on, in their order; those of ``use: validation`` are not among them."""
        return tuple(stream for stream in self.streams if stream.use == "training")

    @property
    def sequence_lengths(self) -> tuple[int, ...]:
        """Every length of rows that the run uses, each once, in the order of use; the first is that of validation."""
        return tuple(
            dict.fromkeys([self.sequence_length, *(stage.sequence_length or self.sequence_length for stage in self.stages)])
        )

    def _stage_rules(self, names: list[str]) -> Iterator[tuple[str, str]]:
        for index, stream in enumerate(self.streams):
            if stream.epochs is not None or stream.share is not None:
                key = "epochs" if stream.epochs is not None else "share"
                yield f"streams[{index}].{key}", "data.stages say how much comes from each stream; remove one of the two"
        for index, stage in enumerate(self.stages):
            last = index == len(self.stages) - 1
            if stage.tokens is None and not last:
                yield f"stages[{index}].tokens", "every stage but the last needs it"
            if stage.tokens is not None and last:
                yield f"stages[{index}].tokens", "the last stage lasts to the end of the run; remove it"
            for name in stage.shares:
                if name not in names:
                    yield f"stages[{index}].shares.{name}", f"there is no stream '{name}'; streams: {', '.join(names)}"
                elif name not in {stream.name for stream in self.trained}:
                    yield f"stages[{index}].shares.{name}", f"'{name}' is for validation (use), not trained on; remove it"

    def _share_rules(self) -> Iterator[tuple[str, str]]:
        shares = [(index, stream.share) for index, stream in enumerate(self.streams) if stream.share is not None]
        total = sum(share for _, share in shares)
        if len(shares) == len(self.trained):
            if abs(total - 1) > _SHARES_SUM_TO_ONE_WITHIN:
                yield "streams[0].share", f"all streams have a share, and they add up to {total:.6g}; allowed: 1"
        elif total > 1 - _SHARES_SUM_TO_ONE_WITHIN:
            yield (
                f"streams[{shares[-1][0]}].share",
                f"shares add up to {total:.6g} and leave nothing for the other streams; lower it",
            )
