"""Which documents are used: filters, duplicates and leaks, against a slow twin that compares every pair of texts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from document_tables import Texts, data_of, finish, jaccard, table, write_texts

from outgrow.errors import DataError, IntegrityError
from outgrow.streaming import twins
from outgrow.streaming.duplicates import bands, signature
from outgrow.streaming.selection import (
    REASONS,
    Selection,
    Split,
    columns_identity,
    needs_languages,
    needs_signatures,
    select,
    selection_identity,
)

WORDS = [a + b for a in ("ба", "ве", "го", "ду", "же", "зи", "ко", "лу", "ма") for b in ("ran", "tis", "mol", "руш", "пель")]
Key = tuple[str, Split, int]


def prose(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) + str(rng.randrange(30)) for _ in range(words))


def keys(texts: Texts) -> list[Key]:
    """Documents in the order of precedence."""
    validation: list[Key] = [(name, "validation", i) for name, (own, _) in texts.items() for i in range(len(own))]
    return validation + [(name, "train", i) for name, (_, own) in texts.items() for i in range(len(own))]


def text_of(texts: Texts, key: Key) -> str:
    name, split, number = key
    return texts[name][split == "train"][number]


def outcome(selection: Selection) -> dict[Key, tuple[str, Key | None]]:
    """Reason and twin of every document."""
    found: dict[Key, tuple[str, Key | None]] = {}
    for (name, split), choice in selection.choices.items():
        for number in range(len(choice)):
            twin: Key | None = None
            if choice.twin[number] >= 0:
                held_out: Split = "validation" if choice.twin_validation[number] else "train"
                twin = (selection.names[choice.twin_stream[number]], held_out, int(choice.twin[number]))
            else:
                assert choice.twin_stream[number] == -1 and not choice.twin_validation[number]
            found[name, split, number] = (REASONS[choice.reason[number]], twin)
    return found


def may_be_dropped_for(later: Key, earlier: Key, across: str) -> bool:
    leak = earlier[1] == "validation" and later[1] == "train"
    return across == "streams" or leak or later[0] == earlier[0]


def slow(texts: Texts, remove: str, across: str = "streams", least: int = 103) -> dict[Key, tuple[str, Key | None]]:
    """One document after the other compared with all that are kept: equal texts, or signatures that share a band and agree."""
    count, rows = bands(0.8)
    signatures = {key: signature(text_of(texts, key)) for key in keys(texts)}
    kept: list[Key] = []
    found: dict[Key, tuple[str, Key | None]] = {}
    for key in keys(texts):
        found[key] = ("kept", None)
        for other in kept:
            same = signatures[key] == signatures[other]
            near = same.sum() >= least and any(same[i * rows : (i + 1) * rows].all() for i in range(count))
            equal = text_of(texts, key) == text_of(texts, other)
            if (equal or (remove == "near" and near)) and may_be_dropped_for(key, other, across):
                reason = "duplicate" if equal else "near_duplicate"
                found[key] = ("like_validation" if (key[1], other[1]) == ("train", "validation") else reason, other)
                break
        else:
            kept.append(key)
    return found


# --- planted likenesses -----------------------------------------------------------------------------------------------


def changed(text: str, rng: random.Random) -> str:
    """A copy as they come: edited words, a moved paragraph, another case and punctuation, a new end."""
    words = text.split()
    kind = rng.randrange(4)
    if kind == 0:
        for _ in range(rng.randrange(1, max(2, len(words) // 60))):
            words[rng.randrange(len(words))] = "правка"
    elif kind == 1:
        a, b = sorted(rng.sample(range(len(words)), 2))
        words = words[:a] + words[b:] + words[a:b]
    elif kind == 2:
        return ", ".join(words).upper() + "!"
    else:
        words += prose(rng, max(1, len(words) // 25)).split()
    return " ".join(words)


def planted(seed: int, documents: int, streams: int = 2) -> dict[str, tuple[list[str], list[str]]]:
    """Streams of texts of which half are copies, equal or changed, of earlier ones, held-out ones among them."""
    rng = random.Random(seed)
    made: list[str] = []
    texts: dict[str, tuple[list[str], list[str]]] = {f"s{i}": ([], []) for i in range(streams)}
    for number in range(documents):
        if made and rng.random() < 0.5:
            source = rng.choice(made)
            made.append(source if rng.random() < 0.3 else changed(source, rng))
        else:
            made.append(prose(rng, rng.choice([3, 8, 60, 200, 400])))
        texts[f"s{rng.randrange(streams)}"][number % 5 > 0].append(made[-1])
    return texts


@pytest.mark.parametrize("across", ["streams", "stream"])
@pytest.mark.parametrize("remove", ["exact", "near"])
def test_the_choice_is_that_of_comparing_one_after_the_other(tmp_path: Path, remove: str, across: str) -> None:
    for seed in range(2):
        texts = planted(seed, 130, streams=3)
        store = write_texts(tmp_path / str(seed), texts, part=17)
        found = outcome(select(store, data_of(list(texts), remove=remove, across=across)))
        expected = slow(texts, remove, across)
        assert {key: reason == "kept" for key, (reason, _) in found.items()} == {
            key: reason == "kept" for key, (reason, _) in expected.items()
        }
        assert sum(reason != "kept" for reason, _ in found.values()) > (8 if remove == "exact" else 20)
        for key, (reason, twin) in found.items():
            if reason != "kept":
                # Of several that it is like, it may name another; that one is kept, earlier, and explains the reason.
                assert twin is not None and found[twin][0] == "kept"
                assert keys(texts).index(twin) < keys(texts).index(key)
                assert may_be_dropped_for(key, twin, across)
                assert (reason == "like_validation") == (key[1] == "train" and twin[1] == "validation")
                if remove == "exact" or reason == "duplicate":
                    assert text_of(texts, key) == text_of(texts, twin)
                else:
                    assert (signature(text_of(texts, key)) == signature(text_of(texts, twin))).sum() >= 103


def test_near_duplicates_against_the_true_similarity_of_all_pairs(tmp_path: Path) -> None:
    """Precision and recall of pairs over 400 documents; what is dropped wrongly is just below the limit."""
    rng = random.Random(5)
    originals = [prose(rng, rng.choice([40, 150, 500])) for _ in range(200)]
    copies = [changed(text, rng) for text in originals]
    texts = {"s": ([], originals + copies)}
    store = write_texts(tmp_path / "s", texts)
    found = outcome(select(store, data_of(["s"], remove="near")))
    alike = [jaccard(one, other) for one, other in zip(originals, copies, strict=True)]
    dropped = [found["s", "train", 200 + number] == ("near_duplicate", ("s", "train", number)) for number in range(200)]
    assert all(found["s", "train", number][0] == "kept" for number in range(200))
    clear = [(hit, value) for hit, value in zip(dropped, alike, strict=True) if abs(value - 0.8) > 0.1]
    assert len(clear) > 120
    assert sum(hit for hit, value in clear if value > 0.8) >= 0.99 * sum(value > 0.8 for _, value in clear)
    assert not [value for hit, value in clear if hit and value < 0.8]
    true = sum(value >= 0.8 for value in alike)
    right = sum(hit and value >= 0.8 for hit, value in zip(dropped, alike, strict=True))
    assert right / sum(dropped) > 0.9  # precision
    assert right / true > 0.9  # recall


def test_a_chain_of_likenesses_does_not_collapse(tmp_path: Path) -> None:
    """Each text is like the next one, and unlike those further on: dropping a link must not drop what it alone was like."""
    rng = random.Random(11)
    words = prose(rng, 1200).split()
    chain = [" ".join(words[start : start + 600]) for start in range(0, 600, 40)]
    kept_counts = []
    for seed in range(4):
        order = random.Random(seed).sample(range(len(chain)), len(chain))
        texts = {"s": ([], [chain[i] for i in order])}
        store = write_texts(tmp_path / str(seed), texts)
        found = outcome(select(store, data_of(["s"], remove="near")))
        assert {k: v[0] for k, v in found.items()} == {k: v[0] for k, v in slow(texts, "near").items()}
        kept_counts.append(sum(reason == "kept" for reason, _ in found.values()))
    assert min(kept_counts) > 3


# --- rules ------------------------------------------------------------------------------------------------------------


def test_leaks_are_dropped_whatever_across_says(tmp_path: Path) -> None:
    rng = random.Random(1)
    held, other = prose(rng, 100), prose(rng, 100)
    texts = {"a": ([held], [other, held.upper()]), "b": ([], [held, other])}
    store = write_texts(tmp_path / "s", texts)
    for across in ("streams", "stream"):
        found = outcome(select(store, data_of(["a", "b"], remove="near", across=across)))
        assert found["a", "train", 1] == ("like_validation", ("a", "validation", 0))
        assert found["b", "train", 0] == ("like_validation", ("a", "validation", 0))
        assert found["b", "train", 1][0] == ("duplicate" if across == "streams" else "kept")
    exact = outcome(select(store, data_of(["a", "b"], remove="exact", across="stream")))
    assert exact["b", "train", 0] == ("like_validation", ("a", "validation", 0))
    assert exact["a", "train", 1][0] == "kept"  # alike, but not the same text
    assert all(reason == "kept" for reason, _ in outcome(select(store, data_of(["a", "b"]))).values())


def test_the_order_of_the_recipe_says_which_is_kept(tmp_path: Path) -> None:
    text = prose(random.Random(2), 50)
    store = write_texts(tmp_path / "s", {"a": ([], [text]), "b": ([], [text])})
    assert outcome(select(store, data_of(["a", "b"], remove="exact")))["b", "train", 0] == ("duplicate", ("a", "train", 0))
    assert outcome(select(store, data_of(["b", "a"], remove="exact")))["a", "train", 0] == ("duplicate", ("b", "train", 0))


def test_filters_come_first_and_what_they_drop_is_no_twin(tmp_path: Path) -> None:
    rng = random.Random(3)
    text = prose(rng, 30)
    texts = {"a": ([text], [text, "коротко"]), "b": ([], [text, text + " " + text])}
    store = write_texts(tmp_path / "s", texts)
    filters = {"a": {"min_chars": 10, "max_chars": len(text) - 1}, "b": {"max_chars": len(text) + 5}}
    found = outcome(select(store, data_of(["a", "b"], filters, remove="near")))
    assert [found[key][0] for key in keys(texts)] == ["too_long_text", "too_long_text", "too_short", "kept", "too_long_text"]


def test_languages_keep_what_is_named_and_drop_the_unknown(tmp_path: Path) -> None:
    texts = ["а", "b", "c", "d"]
    table(texts, ["ru", "en", "", "uk"]).save(tmp_path / "s/streams/a/train", 0)
    store = finish(tmp_path / "s")
    found = select(store, data_of(["a"], {"a": {"languages": ["ru", "uk"]}})).choices["a", "train"]
    assert [REASONS[code] for code in found.reason] == ["kept", "language", "language", "kept"]
    assert len(select(store, data_of(["a"])).choices["a", "validation"]) == 0


def test_documents_without_a_text_are_like_nothing(tmp_path: Path) -> None:
    """Dialogues of tool calls alone have no words, and are not alike for that."""
    made = table(["", "", "слово"])
    made = type(made)(**{**made.arrays, "content": np.arange(6, dtype=np.uint64).reshape(3, 2)})
    made.save(tmp_path / "s/streams/a/train", 0)
    store = finish(tmp_path / "s")
    assert select(store, data_of(["a"], remove="near")).choices["a", "train"].kept.all()


def test_parts_of_the_build_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = planted(8, 120)
    whole = select(write_texts(tmp_path / "1", texts), data_of(list(texts), remove="near"))
    monkeypatch.setattr(twins, "_SORTED_AT_ONCE", 16)  # sorted in shares, with signatures of few files open at once
    monkeypatch.setattr(twins, "_COMPARED_AT_ONCE", 5)
    monkeypatch.setattr(twins, "_OPEN_FILES", 2)
    parts = select(write_texts(tmp_path / "2", texts, part=7), data_of(list(texts), remove="near"))
    for key, choice in whole.choices.items():
        for column in ("reason", "twin_stream", "twin_validation", "twin"):
            assert np.array_equal(getattr(choice, column), getattr(parts.choices[key], column)), (key, column)
            assert getattr(choice, column).dtype == getattr(parts.choices[key], column).dtype


def test_keys_with_equal_first_halves_are_told_apart() -> None:
    first = np.zeros(6, np.uint64)
    second = np.array([5, 7, 5, 9, 7, 5], np.uint64)
    everything = np.ones(6, np.bool_)
    twin = twins.exact_twins((first, second), everything, lambda a, b: np.ones(len(a), np.bool_))
    assert twin.tolist() == [-1, -1, 0, -1, 1, 0]


def test_a_large_cluster_and_many_that_only_share_a_band(tmp_path: Path) -> None:
    """20,000 copies take one comparison each; 300 texts of one template share bands and are all compared."""
    rng = random.Random(4)
    base = signature(prose(rng, 200))
    generator = np.random.default_rng(0)
    copies = np.tile(base, (20_000, 1))
    copies[np.arange(20_000), generator.integers(0, 128, 20_000)] += 1  # each agrees in 126 numbers or more
    template = generator.integers(0, 2**32, (300, 128), dtype=np.uint32)
    template[:, :8] = 77
    made = table(["x"] * 20_300, signatures=False)
    made = type(made)(**{**made.arrays, "signature": np.concatenate([copies, template])})
    made.save(tmp_path / "t", 0)
    signatures = twins.Signatures([tmp_path / "t/documents/00000.safetensors"], [20_300])
    twin = twins.near_twins(signatures, np.ones(20_300, np.bool_), lambda a, b: np.ones(len(a), np.bool_), 0.8)
    assert (twin[1:20_000] == 0).all() and (twin[20_000:] == -1).all() and twin[0] == -1


def test_an_unfinished_or_damaged_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="never finished"):
        select(tmp_path, data_of(["a"]))
    store = write_texts(tmp_path / "s", {"a": ([], ["слово", "слово"])})
    path = store / "streams/a/train/documents/00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(IntegrityError, match="differ"):
        select(store, data_of(["a"], remove="near"))


# --- what decides it --------------------------------------------------------------------------------------------------


def test_the_identity_changes_with_all_that_changes_the_choice() -> None:
    def identity(names: tuple[str, ...] = ("a", "b"), filters: Mapping[str, Any] | None = None, **duplicates: Any) -> Any:
        return selection_identity(data_of(names, filters, **duplicates))

    different = [
        identity(),
        identity(filters={"a": {"min_chars": 1}}),
        identity(filters={"b": {"min_chars": 1}}),
        identity(filters={"a": {"languages": ["ru"]}}),
        identity(remove="exact"),
        identity(("b", "a"), remove="exact"),
        identity(remove="exact", across="stream"),
        identity(remove="near"),
        identity(remove="near", similarity=0.9),
    ]
    assert all(one != other for i, one in enumerate(different) for other in different[:i])
    assert identity() == identity(("b", "a")) == identity(across="stream") == identity(similarity=0.5)
    assert identity(remove="exact") == identity(remove="exact", similarity=0.5)


def test_languages_and_signatures_are_made_where_they_are_needed() -> None:
    plain, near = data_of(["a"], remove="exact"), data_of(["a"], remove="near")
    chosen = data_of(["a", "b"], {"b": {"languages": ["ru"]}})
    assert [needs_signatures(data) for data in (plain, near, chosen)] == [False, True, False]
    assert [needs_languages(data) for data in (plain, near, chosen)] == [False, False, True]
    found = [columns_identity(data) for data in (plain, near, chosen)]
    assert found[0] == {} and all(one != other for one, other in pairwise(found))
