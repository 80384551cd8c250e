"""Work units to token blocks: every document is in the block or among what it dropped, with its columns."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from text_recipes import make_recipe, text

from outgrow.recipes.schema.data import Data
from outgrow.streaming.contents import content_digest, texts_of
from outgrow.streaming.duplicates import signature
from outgrow.streaming.sources.document import Dialogue, Document, Dropped, Message, PreferencePair
from outgrow.streaming.sources.documents import DocumentsUnit
from outgrow.streaming.token_block import TokenBlock
from outgrow.streaming.tokenise import Tokenise, tokenise_work
from outgrow.streaming.tokenizer import TextTokenizer, train

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return train([text(number, 200) for number in range(20)], 400, tmp_path_factory.mktemp("t") / "tokenizer")


def section(*streams: dict[str, Any], **data: Any) -> Data:
    return make_recipe(*streams, **data).data


def custom(name: str, **keys: Any) -> dict[str, Any]:
    return {"name": name, "source": {"kind": "custom", "factory": "nothing:calls_it"}, **keys}


def made(tokenizer: TextTokenizer, data: Data, number: int, *items: Document | Dropped, **needed: bool) -> TokenBlock:
    """The block of the items as one unit of stream ``number``, made by work that went through a pickle."""
    asked = {"languages": False, "signatures": False} | needed
    work = tokenise_work(tokenizer.folder, (TEMPLATE,) * len(data.streams), data, **asked)
    tokenise: Tokenise = pickle.loads(pickle.dumps(work))()
    return pickle.loads(pickle.dumps(tokenise((number, DocumentsUnit(items=items, num_bytes=77)))))


def test_texts_become_tokens_with_their_columns(tokenizer: TextTokenizer) -> None:
    texts = [text(number, 5 + 3 * number) for number in range(40)]
    items = [Document(content=t, source=f"f#{n}", meta={"b": n, "a": "Ж"}) for n, t in enumerate(texts)]
    block = made(tokenizer, section(custom("a"), custom("b")), 1, *items)
    assert (block.stream, block.num_bytes, block.dropped, block.cleaned) == (1, 77, (), ())
    for sample, content in zip(block.samples(), texts, strict=True):
        assert tokenizer.decode(sample.tokens.astype(np.int64)) == content + "<|endoftext|>"
        assert sample.weights is None and sample.spans is None
    assert [json.loads(meta) for meta in block.metas] == [item.meta for item in items]
    assert block.metas[0] == '{"a": "Ж", "b": 0}'
    assert block.sources == tuple(item.source for item in items)
    table = block.table
    assert table.chars.tolist() == [len(t) for t in texts]
    assert table.content.astype("<u8").tobytes() == b"".join(content_digest(t)[:16] for t in texts)
    assert block.validation.tolist() == [int.from_bytes(content_digest(t)[:8], "big") < 0.2 * 2**64 for t in texts]
    assert table.language is None and table.signature is None
    assert int(table.border_counts.sum()) == len(table.borders)


def test_languages_and_signatures_are_those_of_the_cleaned_text(tokenizer: TextTokenizer) -> None:
    russian = "Москва - столица России, население города растёт с каждым годом."
    english = "The population of the capital grows from year to year, says the city."
    items = [Document(content=content, source="x") for content in (russian, english, np.array([5, 6, 7]))]
    block = made(tokenizer, section(custom("a")), 0, *items, languages=True, signatures=True)
    assert block.table.language is not None and block.table.signature is not None
    assert block.table.language.tobytes() == b"ruen\0\0"
    for row, item in zip(block.table.signature, items, strict=True):
        assert np.array_equal(row, signature(item.content))  # type: ignore[arg-type]
    assert block.table.chars.tolist() == [len(russian), len(english), 0]


def test_what_the_source_dropped_and_what_cleaning_emptied_is_listed(tokenizer: TextTokenizer) -> None:
    step = {"kind": "custom", "factory": "cleaning_steps:without_x"}
    data = section(custom("a", clean=[step, {"kind": "nfc"}]))
    bad = Dropped(source="f#2", reason="malformed", detail="no", content="?")
    items = [Document(content=c, source=f"f#{n}") for n, c in enumerate(("axb", "xx", "", "ab", "xax"))]
    block = made(tokenizer, data, 0, *items[:2], bad, *items[2:])
    assert block.cleaned == ((3, 3), (0, 0)), "of a step of the user's own, a changed text is one change"
    assert block.sources == ("f#0", "f#3", "f#4")
    assert [(d.source, d.reason) for d in block.dropped] == [("f#1", "empty"), ("f#2", "malformed"), ("f#2", "empty")]
    assert block.dropped[1] == bad
    assert block.table.chars.tolist() == [2, 2, 1]


def test_dialogues_and_pairs_have_weights_and_spans(tokenizer: TextTokenizer) -> None:
    def said(role: str, content: str) -> Message:
        return {"role": role, "content": content}

    prompt = Dialogue(messages=(said("user", text(1, 8)),))
    answers = [(said("assistant", text(n, 9)),) for n in (2, 3)]
    talk = Dialogue(messages=(*prompt.messages, *answers[0]))
    pair = PreferencePair(prompt=prompt, chosen=answers[0], rejected=answers[1])
    items = [Document(content=c, source=str(n)) for n, c in enumerate((talk, text(5, 5), pair))]
    block = made(tokenizer, section(custom("a")), 0, *items)
    one, plain, both = block.samples()
    assert one.weights is not None and 0 < one.weights.sum() < len(one.tokens) and one.spans is None
    assert plain.weights is None and block.table.uniform.tolist() == [False, True, False]
    assert both.weights is not None and both.spans is not None
    (start, middle), (again, stop) = both.spans.tolist()
    assert (start, middle, stop) == (0, again, len(both.tokens))
    decoded = tokenizer.decode(both.tokens[:middle].astype(np.int64)), tokenizer.decode(both.tokens[middle:].astype(np.int64))
    for shown, answer in zip(decoded, answers, strict=True):
        assert prompt.messages[0]["content"] in shown and answer[0]["content"] in shown
    assert block.table.chars.tolist() == [sum(map(len, texts_of(item.content))) for item in items]


def test_a_unit_of_nothing_gives_a_block_of_nothing(tokenizer: TextTokenizer) -> None:
    block = made(tokenizer, section(custom("a", clean=[{"kind": "nfc"}])), 0)
    assert len(block.table) == 0 and list(block.samples()) == [] and block.cleaned == ((0, 0),)
