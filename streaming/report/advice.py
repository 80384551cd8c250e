"""What a report warns of: figures that nearly always mean that something is wrong or wasted, and the nearest thing to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from outgrow.recipes.schema.data import Data, TrainTokenizer
from outgrow.recipes.schema.streams import Stream
from outgrow.streaming.report.facts import HELD_OUT, TRAINED, IndexFigures, MixPart, StreamFacts
from outgrow.streaming.report.samples import LanguageFigures

MOST_TOKENS_A_WORD = 2.5
"""Tokenizers made for a language take 1.3 to 2 tokens a word of its prose; one that does not know it takes 3 and more."""
NO_SPACES = ("zh", "ja", "th", "lo", "km", "my", "bo")
"""Languages that are written without spaces between words: tokens a word mean nothing."""

_ENOUGH_WORDS = 500
_MOST_DROPPED = 0.3
_LEAST_LEARNED = 0.02
_LEAST_FILL = 0.9
_MOST_PASSES = 4
"""Up to four passes teach nearly as much as new text (Muennighoff et al. 2023, Scaling Data-Constrained Language Models)."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """``says`` what was found, ``do`` what to do about it."""

    says: str
    do: str


def advice(
    data: Data,
    streams: Sequence[StreamFacts],
    indexes: Sequence[IndexFigures],
    languages: Mapping[str, LanguageFigures],
    mix: Sequence[MixPart],
) -> list[Advice]:
    """Everything that a person should look at before the run; ``languages`` are those of all streams, ``mix`` ends with the
    whole run."""
    given = {stream.name: stream for stream in data.streams}
    return [
        *_of_tokenizer(data, languages),
        *(found for stream in streams for found in _of_stream(stream, given[stream.name], data.validation_fraction)),
        *(found for index in indexes for found in _of_rows(index, given)),
        *_of_mix(mix[-1]),
    ]


def tokens_a_word(language: str, figures: LanguageFigures) -> float | None:
    """Of prose; None where there is too little, or the language has no spaces."""
    if language in NO_SPACES or figures.prose_words < _ENOUGH_WORDS:
        return None
    return figures.prose_tokens / figures.prose_words


def _of_tokenizer(data: Data, languages: Mapping[str, LanguageFigures]) -> Iterator[Advice]:
    for language, figures in languages.items():
        fertility = tokens_a_word(language, figures)
        if not language or fertility is None or fertility <= MOST_TOKENS_A_WORD:
            continue
        if isinstance(data.tokenizer, TrainTokenizer):
            do = f"raise data.tokenizer.vocab_size (now {data.tokenizer.vocab_size:,})"
        else:
            do = f"choose a model whose tokenizer knows '{language}', or train a tokenizer for a new one (kind: train)"
        yield Advice(
            says=f"the tokenizer takes {fertility:.2f} tokens a word of '{language}'; one that suits it takes 1.3 to 2",
            do=f"{do}; as it is, rows hold less text and every answer takes more steps",
        )


def _of_stream(stream: StreamFacts, given: Stream, validation_fraction: float) -> Iterator[Advice]:
    dropped, every = sum(stream.dropped.values()), sum(stream.documents.values())
    if dropped > _MOST_DROPPED * every:
        reason, count = max(stream.dropped.items(), key=lambda item: item[1])
        yield Advice(
            says=f"{dropped / every:.0%} of the documents of '{stream.name}' are in no row, {count:,} of them for '{reason}'",
            do=f"see whether that is meant: outgrow data dropped RECIPE --stream {stream.name} --reason {reason}",
        )
    if given.use == "training" and stream.learned < _LEAST_LEARNED:
        yield Advice(
            says=f"only {stream.learned:.1%} of the tokens of '{stream.name}' are learned",
            do="look at its samples below; chat.roles, chat.answers and the template say which turns are learned",
        )
    if validation_fraction and not stream.documents.get(HELD_OUT):
        yield Advice(
            says=f"'{stream.name}' has no held-out document, so its validation loss is not measured",
            do="raise data.validation_fraction, or give it more documents",
        )
    too_long = stream.dropped.get("too_long", 0)
    if too_long > 0.01 * max(1, stream.documents.get(TRAINED, 0)):
        yield Advice(
            says=f"{too_long:,} documents of '{stream.name}' are longer than a row and dropped",
            do="raise data.sequence_length" + ("" if stream.built.pairs else ", or set too_long: split for the stream"),
        )


def _of_rows(index: IndexFigures, given: Mapping[str, Stream]) -> Iterator[Advice]:
    for split in index.streams:
        fill = split.tokens / max(1, split.rows * index.sequence_length)
        if split.rows > 10 and fill < _LEAST_FILL:
            order = " and order: shuffled" if given[split.name].order == "sequential" else ""
            anywhere = "" if split.pairs else f"split: anywhere{order}, or "  # a pair stays in one row
            yield Advice(
                says=f"rows of {index.sequence_length:,} of '{split.name}' are {fill:.0%} full; the rest is computed in vain",
                do=f"set {anywhere}a sequence_length that its documents fill better",
            )


def _of_mix(run: MixPart) -> Iterator[Advice]:
    for name, passes in run.passes.items():
        if passes > _MOST_PASSES:
            yield Advice(
                says=f"the run reads '{name}' {passes:.1f} times; after some {_MOST_PASSES} passes a text teaches little more",
                do="lower its epochs or share, or give it more text",
            )
