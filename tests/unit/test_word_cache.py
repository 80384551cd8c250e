"""The tokenizer that remembers words gives the tokens of the one that does not, on any text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_recipes import text
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from outgrow.streaming import word_cache
from outgrow.streaming.tokenizer import TextTokenizer
from outgrow.streaming.word_cache import CachingTokenizer, words_of

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = ("gpt2", "gpt2 with nfc", "llama3", "qwen2")
PIECES = [
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\x1c", "\x7f", "\x85", "\xa0", "\u3000", "\u200b"),
    *("'", "'s", "'S", "'ſ", "'ll", "it's", "a", "B", "word", "Слово", "ёлка", "é", "e\u0301", "и\u0306", "ї", "漢字", "ß"),
    *("1", "12", "1234", "٣", "²", ".", ",", "()", "=>", ";\n", "_", "«", "»", "…", "—", "🙂", "\u0301"),
    *("<think>", "<|endoftext|>"),
]


def saved(folder: Path, kind: str) -> Path:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex="gpt2" in kind)
    split = LLAMA3 if kind == "llama3" else LLAMA3.replace("{1,3}", "")
    sequence = [pre_tokenizers.Split(Regex(split), "isolated"), byte_level]
    tokenizer.pre_tokenizer = byte_level if "gpt2" in kind else pre_tokenizers.Sequence(sequence)
    if kind in ("qwen2", "gpt2 with nfc"):
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=["<|endoftext|>"], initial_alphabet=sorted(byte_level.alphabet()), show_progress=False
    )
    rng = random.Random(1)
    # Trained on whole texts of such pieces, so that merges across what would be a wrong end of a word exist.
    tokenizer.train_from_iterator(["".join(rng.choices(PIECES, k=200)) for _ in range(400)], trainer)
    if kind == "qwen2":
        tokenizer.add_tokens(["<think>"])  # not special: found within text
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[CachingTokenizer, TextTokenizer]]:
    root = tmp_path_factory.mktemp("kinds")
    return {kind: (CachingTokenizer(folder), TextTokenizer(folder)) for kind in KINDS for folder in [saved(root / kind, kind)]}


def assert_equal(tokenizers: tuple[CachingTokenizer, TextTokenizer], texts: list[str], tag: int | None = None) -> None:
    caching, plain = (tokenizer.encode(texts, tag=tag) for tokenizer in tokenizers)
    for given_text, own, expected in zip(texts, caching, plain, strict=True):
        assert own.dtype == expected.dtype and np.array_equal(own, expected), repr(given_text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=3)), max_size=40))
def test_the_same_tokens_for_any_text(kind: str, both: Any, parts: list[str]) -> None:
    assert both[kind][0]._word_pattern is not None
    assert_equal(both[kind], ["".join(parts).encode(errors="replace").decode()])


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_for_long_texts_and_again_for_what_is_remembered(
    kind: str, both: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(2)
    texts = ["".join(rng.choices(PIECES, k=3000)) for _ in range(20)] + [text(n, 300) for n in range(20)] + ["", "x" * 100_000]
    assert_equal(both[kind], texts)
    assert_equal(both[kind], texts, tag=7)
    monkeypatch.setattr(word_cache, "_MOST_WORDS", 50)  # forgotten time and again
    for module in ("word_cache", "stretches"):
        monkeypatch.setattr(f"outgrow.streaming.{module}.PIECE_CHARS", 500)
    assert_equal(both[kind], texts[:30])


@pytest.mark.parametrize("kind", KINDS)
def test_most_words_are_met_again(kind: str, both: Any) -> None:
    """Else the cache would be right and of no use: prose is divided into words, not into long runs."""
    prose = (
        "Москва — столица России; население города растёт, и (как пишут) не только оно.\nThe city's 12 gates aren't closed.\n"
    )
    words = both[kind][0]._word_pattern.findall(prose)
    assert "".join(words) == prose
    assert len(words) > 25 and max(map(len, words)) < 16


def test_tokenizers_of_other_kinds_are_used_as_they_are(both: Any) -> None:
    form = json.loads((both["gpt2"][1].folder / "tokenizer.json").read_text())
    assert words_of(form) is not None
    byte_level = form["pre_tokenizer"]
    for change in (
        {"normalizer": {"type": "NFKC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": True}},
        {"pre_tokenizer": {**byte_level, "add_prefix_space": True}},
        {"pre_tokenizer": {**byte_level, "use_regex": False}},
        {"model": {**form["model"], "dropout": 0.1}},
        {"model": {"type": "Unigram"}},
    ):
        assert words_of(form | change) is None
