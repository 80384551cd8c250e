"""What a report warns of, each with figures just within and just beyond the limit."""

from __future__ import annotations

import pytest
from document_tables import data_of

from outgrow.recipes.schema.data import Data, FolderTokenizer
from outgrow.streaming.report.advice import advice, tokens_a_word
from outgrow.streaming.report.facts import IndexFigures, MixPart, StreamFacts
from outgrow.streaming.report.lengths import Lengths
from outgrow.streaming.report.samples import LanguageFigures
from outgrow.streaming.rows import SplitFacts
from outgrow.streaming.store import StreamCounts


def stream(*, learned: float = 1.0, tokens: int = 1000, pairs: bool = False, **documents: int) -> StreamFacts:
    counts = {"training": 100, "held out": 1} | {name.replace("held_out", "held out"): n for name, n in documents.items()}
    built = StreamCounts(
        name="a",
        documents=100,
        tokens=tokens,
        validation_documents=1,
        validation_tokens=1,
        dropped={},
        cleaned=(),
        pairs=pairs,
        inputs=1,
        source_bytes=1,
    )
    return StreamFacts(
        name="a",
        kind="text",
        built=built,
        documents=counts,
        tokens={"training": tokens},
        lengths=Lengths(),
        weight=learned * tokens,
        examples={},
    )


def index(*, filled: float = 1.0, rows: int = 100, pairs: bool = False) -> IndexFigures:
    split = SplitFacts(
        name="a",
        documents=1,
        tokens=int(64 * rows * filled),
        rows=rows,
        fewest_rows=rows,
        cuts=1,
        cuts_at_borders=1,
        sequential=False,
        pairs=pairs,
        dropped={},
    )
    return IndexFigures(sequence_length=64, streams=(split,))


def language(fertility: float, words: int = 1000) -> LanguageFigures:
    return LanguageFigures(documents=9, chars=6000, tokens=5000, prose_words=words, prose_tokens=round(words * fertility))


def told(
    data: Data | None = None,
    streams: tuple[StreamFacts, ...] = (),
    indexes: tuple[IndexFigures, ...] = (),
    languages: dict[str, LanguageFigures] | None = None,
    passes: float = 1.0,
) -> list[str]:
    """What is said and what to do, a line each."""
    run = MixPart(name="The whole run", steps=1, tokens={"a": 1.0}, passes={"a": passes})
    found = advice(data or data_of(["a"]), streams, indexes, languages or {}, [run])
    return [f"{item.says}: {item.do}" for item in found]


def only(lines: list[str]) -> str:
    assert len(lines) == 1, lines
    return lines[0]


def test_nothing_is_said_where_all_is_well() -> None:
    assert told(streams=(stream(),), indexes=(index(),), languages={"ru": language(1.9), "": language(9)}, passes=4.0) == []


def test_a_tokenizer_that_wastes_is_named_with_the_nearest_thing_to_do() -> None:
    assert told(languages={"ru": language(2.5)}) == []
    line = only(told(languages={"en": language(1.4), "ru": language(2.51)}))
    assert "2.51 tokens a word of 'ru'" in line and "raise data.tokenizer.vocab_size (now 300)" in line
    folder = data_of(["a"]).model_copy(update={"tokenizer": FolderTokenizer(kind="folder", path="tokenizer")})
    assert "choose a model whose tokenizer knows 'ru'" in only(told(folder, languages={"ru": language(3)}))


@pytest.mark.parametrize(("code", "words", "known"), [("ru", 1000, True), ("ru", 100, False), ("zh", 1000, False)])
def test_tokens_a_word_need_words(code: str, words: int, known: bool) -> None:
    assert (tokens_a_word(code, language(3, words)) is not None) == known


def test_a_stream_that_loses_much_is_named_with_its_commonest_reason() -> None:
    assert told(streams=(stream(near_duplicate=30),)) == []
    line = only(told(streams=(stream(near_duplicate=35, too_short=15),)))
    assert "33% of the documents of 'a'" in line and "35 of them for 'near_duplicate'" in line
    assert "--stream a --reason near_duplicate" in line


def test_a_stream_that_is_hardly_learned_or_not_measured_is_named() -> None:
    assert "only 1.9% of the tokens" in only(told(streams=(stream(learned=0.019),)))
    assert told(streams=(stream(learned=0.021),)) == []
    assert "no held-out document" in only(told(streams=(stream(held_out=0),)))


def test_documents_too_long_for_a_row_are_named() -> None:
    assert told(streams=(stream(too_long=1),)) == []
    assert "2 documents of 'a' are longer than a row" in only(told(streams=(stream(too_long=2),)))


def test_rows_that_are_not_full_are_named() -> None:
    assert told(indexes=(index(filled=0.91),)) == []
    assert "rows of 64 of 'a' are 85% full" in only(told(indexes=(index(filled=0.85),)))
    assert told(indexes=(index(filled=0.5, rows=10),)) == []  # the last row of a few is seldom full


def test_no_pair_is_to_be_split() -> None:
    assert "too_long: split" in only(told(streams=(stream(too_long=2),)))
    assert "split: anywhere" in only(told(indexes=(index(filled=0.5),)))
    lines = told(streams=(stream(too_long=2, pairs=True),), indexes=(index(filled=0.5, pairs=True),))
    assert len(lines) == 2 and not any("split" in line for line in lines), lines


def test_text_that_is_read_too_often_is_named() -> None:
    assert "reads 'a' 6.0 times" in only(told(passes=6.0))
