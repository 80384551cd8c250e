"""Rows as a person reads them: the text of every segment, what of it is learned, and the answers of pairs by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from token_stores import Dataset, make_dataset, stored

from outgrow.errors import DataError
from outgrow.recipes.schema.site import Site
from outgrow.streaming.inspect import ReadableRow, first_rows
from outgrow.streaming.store import TOKENIZER
from outgrow.streaming.tokenizer import train

TEXT = "Plain text is learned whole. "
TURNS = ("user: how are you? ", "thinking: well. ", "answer: fine.")
CHOSEN, REJECTED = "q: 2+2? a: 4", "q: 2+2? a: 5"
THIRDS = {"pairs": 1 / 3, "talk": 1 / 3, "text": 1 / 3}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A text, a dialogue whose answer is learned and whose thinking half, and a preference pair; the second of two stages has
    rows of half the length."""
    folder = tmp_path_factory.mktemp("inspect")
    tokenizer = train([TEXT, *TURNS, CHOSEN, REJECTED], 260, folder / "tokenizer")
    turns = [tokens[:-1] for tokens in tokenizer.encode(list(TURNS))]
    weights = np.concatenate([np.full(len(t), w, np.float32) for t, w in zip(turns, (0, 0.5, 1), strict=True)])
    answers = [tokens[:-1] for tokens in tokenizer.encode([CHOSEN, REJECTED])]
    spans = np.array([[0, len(answers[0])], [len(answers[0]), sum(map(len, answers))]], np.int32)
    streams = {
        "pairs": ([stored(np.concatenate(answers), source="pair", spans=spans)], []),
        "talk": ([stored(np.concatenate(turns), source="talk#7", weights=weights)], []),
        "text": ([stored(tokenizer.encode([TEXT])[0][:-1], source="a.txt")], []),
    }
    stages = [{"tokens": 3 * 64, "shares": THIRDS}, {"shares": THIRDS, "sequence_length": 32}]
    options = {"pairs": {"split": "never"}}
    made = make_dataset(folder, streams, sequence_length=64, options=options, data={"stages": stages})
    (folder / "tokenizer").rename(made.store / TOKENIZER)
    return made


def read(dataset: Dataset, count: int, step: int) -> list[ReadableRow]:
    site = Site.model_validate({"schema": 1, "storage": str(dataset.root)})
    return list(first_rows(dataset.recipe(rows=1), site, dataset.card, count, step=step))


def test_what_is_learned_stands_between_brackets(dataset: Dataset) -> None:
    rows = {row.stream: row for row in read(dataset, 3, 0)}
    (text,), (talk,) = rows["text"].segments, rows["talk"].segments
    assert (text.source, text.text, text.marked, text.answer) == ("a.txt", TEXT, TEXT, "")
    assert (talk.source, talk.text) == ("talk#7", "".join(TURNS))
    assert talk.marked == "user: how are you? ⟦0.5: thinking: well. ⟧⟦answer: fine.⟧"
    assert (talk.start, talk.length, talk.document_tokens) == (0, rows["talk"].tokens, rows["talk"].tokens)


def test_the_answers_of_a_pair_are_named(dataset: Dataset) -> None:
    (row,) = [row for row in read(dataset, 3, 0) if row.stream == "pairs"]
    assert [(s.answer, s.text) for s in row.segments] == [("chosen 0", CHOSEN), ("rejected 0", REJECTED)]
    assert sum(segment.length for segment in row.segments) == row.segments[0].document_tokens == row.tokens


def test_rows_begin_with_any_step_and_are_those_of_its_stage(dataset: Dataset) -> None:
    rows = read(dataset, 8, 1)
    assert [row.step for row in rows] == list(range(1, 9))
    assert [row.sequence_length for row in rows] == [64, 64, *[32] * 6]
    assert read(dataset, 3, 6) == rows[5:]
    assert all(row.tokens <= row.sequence_length for row in rows)


def test_part_of_a_document_says_where_it_begins(dataset: Dataset) -> None:
    parts = {s.start: s for row in read(dataset, 12, 3) if row.stream == "talk" for s in row.segments}
    assert list(parts) != [0]
    last = parts[max(parts)]
    assert last.marked == f"⟦{last.text}⟧", "all of this part is learned, but not all of its document"
    assert "".join(parts[start].text for start in sorted(parts)) == "".join(TURNS)


def test_a_dataset_of_another_node_is_missed(dataset: Dataset, tmp_path: Path) -> None:
    site = Site.model_validate({"schema": 1, "storage": str(tmp_path)})
    with pytest.raises(DataError, match="has no dataset"):
        next(first_rows(dataset.recipe(), site, dataset.card, 1))
