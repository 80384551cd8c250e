"""Borders of sentences and lines: the tables against a slow twin that reads the text of each token."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_render import KINDS, make_tokenizer

from outgrow.streaming import borders
from outgrow.streaming.borders import SentenceBorders
from outgrow.streaming.tokenizer import TextTokenizer

CLOSERS = "\"'»”’“)]}*_"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: TextTokenizer(make_tokenizer(kind, root / kind)) for kind in KINDS}


def pieces(tokenizer: TextTokenizer, tokens: np.ndarray) -> list[str]:
    """The text of each token; of a special one None's: the empty text."""
    texts = tokenizer.token_texts()
    special = {number for number, token in tokenizer.added_tokens.items() if token.special}
    return ["" if token in special else texts[token] for token in tokens.tolist()]


def slow_borders(texts: list[str]) -> list[int]:
    found = []
    for at in range(1, len(texts)):
        before, after = texts[at - 1], texts[at]
        back = at - 1
        while back > max(0, at - 3) and before and not texts[back].strip(CLOSERS):
            back -= 1
        ends = texts[back].rstrip(CLOSERS)[-1:] in (*".!?…。！？",) and all(not t.strip(CLOSERS) for t in texts[back + 1 : at])
        sentence = ends and after[:1].isspace()
        line = "\n" in before[len(before.rstrip(" \t\n")) :] and before.rstrip(" \t").endswith("\n")
        if sentence or (line and after[:1] not in ("", "\n", "\r")):
            found.append(at)
    return found


TEXT = st.lists(
    st.sampled_from(
        ["Да", " нет", ".", "!", "…", "?", "»", ")", '"', " ", "\n", "\n\n", "  ", "The end.", " Mr. X", "3.14", "\t", "。"]
    ),
    max_size=25,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_borders_are_those_of_the_slow_twin(tokenizers: dict[str, TextTokenizer], kind: str, text: str) -> None:
    tokenizer = tokenizers[kind]
    (tokens,) = tokenizer.encode([text])
    found = SentenceBorders(tokenizer).find(tokens)
    assert found.dtype == np.int32
    assert found.tolist() == slow_borders(pieces(tokenizer, tokens))
    with pytest.MonkeyPatch.context() as patch:
        for at_once in (1, 4):  # a slice that begins anywhere
            patch.setattr(borders, "_AT_ONCE", at_once)
            assert SentenceBorders(tokenizer).find(tokens).tolist() == found.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_and_lines_of_plain_text(tokenizers: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    text = 'Он ушёл. "Куда?" - спросил я. It is 3.14! (Yes.) "No." And\nnext\n\n\tline\n'
    (tokens,) = tokenizer.encode([text])
    starts = [0, *SentenceBorders(tokenizer).find(tokens).tolist(), len(tokens) - 1]
    parts = [tokenizer.decode(tokens[start:stop]).strip() for start, stop in zip(starts, starts[1:], strict=False)]
    assert parts == ["Он ушёл.", '"Куда?"', "- спросил я.", "It is 3.14!", "(Yes.)", '"No."', "And", "next", "line"]


def test_token_texts_spell_the_text(tokenizers: dict[str, TextTokenizer]) -> None:
    for kind, tokenizer in tokenizers.items():
        text = "Привет, мир!\n\n\tIt's  12 <b>"
        (tokens,) = tokenizer.encode([text])
        spelled = "".join(pieces(tokenizer, tokens))
        assert (spelled if kind == "bytes" else spelled.removeprefix(" ")) == text or "\ufffd" in spelled


def test_few_tokens_have_no_border(tokenizers: dict[str, TextTokenizer]) -> None:
    borders = SentenceBorders(tokenizers["bytes"])
    for count in (0, 1):
        assert borders.find(np.zeros(count, np.uint16)).tolist() == []


def test_ten_million_tokens_a_second_and_more(tokenizers: dict[str, TextTokenizer]) -> None:
    borders = SentenceBorders(tokenizers["bytes"])
    tokens = np.random.default_rng(0).integers(0, 400, 2_000_000).astype(np.uint16)
    borders.find(tokens)
    before = time.process_time()
    borders.find(tokens)
    assert time.process_time() - before < 0.2
