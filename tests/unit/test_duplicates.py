"""Signatures estimate the likeness of texts, and bands find the pairs that they should."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest
from document_tables import jaccard

from outgrow.streaming import duplicates
from outgrow.streaming.duplicates import band_keys, bands, share_a_band, signature

ENGLISH = ["ash", "birch", "cedar", "elm", "fir", "gorse", "hazel", "ivy", "juniper", "larch", "maple", "oak", "pine", "yew"]
RUSSIAN = ["берёза", "вяз", "груша", "дуб", "ель", "жасмин", "ива", "калина", "липа", "можжевельник", "ольха", "пихта", "ясень"]


def agreement(one: npt.NDArray[np.uint32], other: npt.NDArray[np.uint32]) -> int:
    return int((one == other).sum())


def edited(words: list[str], edits: int, rng: random.Random) -> str:
    words = list(words)
    for place in rng.sample(range(len(words)), edits):
        words[place] = f"edit{rng.random()}".replace(".", "")
    return " ".join(words)


@pytest.mark.parametrize("vocabulary", [ENGLISH, RUSSIAN])
@pytest.mark.parametrize("length", [30, 300, 2000])
def test_agreement_estimates_the_true_jaccard_similarity(vocabulary: list[str], length: int) -> None:
    rng = random.Random(length)
    errors, expected = [], []
    for edits in range(0, 40, 2):
        words = [rng.choice(vocabulary) + str(rng.randrange(50)) for _ in range(length)]
        one, other = " ".join(words), edited(words, edits * length // 400, rng)
        estimate = agreement(signature(one), signature(other)) / 128
        errors.append(estimate - jaccard(one, other))
        expected.append(jaccard(one, other))
    assert min(expected) < 0.6 < 0.99 < max(expected)
    assert abs(np.mean(errors)) < 0.025  # 20 estimates with a standard error below 0.045 each
    assert max(map(abs, errors)) < 0.15


def test_case_punctuation_and_spaces_do_not_count_but_words_and_their_order_do() -> None:
    plain = "one two three four five six"
    assert (signature(plain) == signature("  One, TWO;\n three — four: “five” six!")).all()
    assert (signature("Ёж и ЁЛКА стоят у дома") == signature("ёж и ёлка стоят у дома")).all()
    assert agreement(signature(plain), signature("six five four three two one")) < 30
    assert agreement(signature(plain), signature(plain + " seven eight nine")) < 100


def test_short_texts_are_one_gram_and_wordless_ones_are_like_none_but_their_equal() -> None:
    assert (signature("Да, конечно") == signature("да конечно")).all()
    assert not signature("").any() and not signature(np.empty(0, np.int64)).any()
    for one, other in (("да", "нет"), ("a b", "b a"), ("a b", "b"), ("!!!", "???"), ("", "!")):
        assert agreement(signature(one), signature(other)) < 30, (one, other)
    assert (signature("?!") == signature("?!")).all()


def test_characters_of_writing_without_spaces_are_words() -> None:
    one = "".join(chr(0x4E00 + i * 7) for i in range(200))
    other = one[:195] + "山水火土木"
    assert jaccard(" ".join(one), " ".join(other)) == pytest.approx(0.953, abs=0.02)
    assert agreement(signature(one), signature(other)) > 110


def test_token_ids_have_5_grams_too() -> None:
    ids = np.random.default_rng(0).integers(0, 50_000, 400)
    other = ids.copy()
    other[7] += 1
    assert agreement(signature(ids), signature(other)) > 115
    assert agreement(signature(ids), signature(ids + 1)) < 20
    assert (signature(ids) == signature(ids.astype(np.uint16))).all()


def test_a_long_text_in_pieces_has_the_same_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    text = " ".join(rng.choice(RUSSIAN) + str(rng.randrange(90)) for _ in range(2000))
    whole = signature(text)
    monkeypatch.setattr(duplicates, "_PIECE_CHARS", 100)
    assert (signature(text) == whole).all()
    monkeypatch.setattr(duplicates, "_PIECE_CHARS", 3)  # shorter than words: they are divided, but none is lost
    assert len(duplicates._words("abcdefgh ij")) == 3


def test_signatures_stay_as_they_are() -> None:
    """Stores keep them: where these change, ``duplicates.FORMAT`` must change too."""
    assert duplicates.FORMAT == 1
    assert signature("Мороз и солнце день чудесный").tolist()[:3] == [3595408366, 4214978804, 4053110002]
    assert signature(np.arange(10)).tolist()[:3] == [3287361885, 3280511805, 3307224337]


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_find_what_is_alike(similarity: float) -> None:
    count, rows = bands(similarity)
    assert count * rows <= 128
    assert 1 - (1 - similarity**rows) ** count > 0.85
    assert 1 - (1 - min(1, similarity + 0.05) ** rows) ** count > 0.95


def test_bands_make_least_of_the_weighted_errors() -> None:
    assert bands(0.8) == (16, 8)

    def cost(count: int, rows: int) -> float:
        found = [1 - (1 - (i / 2000) ** rows) ** count for i in range(2000)]
        return 0.05 * sum(found[:1600]) + 0.95 * sum(1 - p for p in found[1600:])

    least = min((cost(count, rows), count, rows) for rows in range(1, 129) for count in range(1, 128 // rows + 1))
    assert least[1:] == (16, 8)


def test_keys_of_a_band_are_equal_where_all_its_rows_are() -> None:
    part = np.random.default_rng(1).integers(0, 2, (4000, 6), dtype=np.uint32)
    keys = band_keys(part)
    assert len(np.unique(keys)) == len(np.unique(part, axis=0)) == 64
    first = {row.tobytes(): key for row, key in zip(part, keys, strict=True)}
    assert all(first[row.tobytes()] == key for row, key in zip(part, keys, strict=True))


def test_agreement_and_shared_bands_of_pairs() -> None:
    base = signature("один два три четыре пять шесть семь")
    pairs = np.tile(base, (4, 1))
    pairs[1, :25] += 1
    pairs[2, 1:] += 1
    pairs[3, ::8] += 1  # each of the 16 bands has a row that differs
    assert duplicates.agreement(np.tile(base, (4, 1)), pairs).tolist() == [128, 103, 1, 112]
    assert share_a_band(np.tile(base, (4, 1)), pairs, 0.8).tolist() == [True, True, False, False]
