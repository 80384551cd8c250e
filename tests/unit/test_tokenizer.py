"""Tokenizers: trained deterministically, saved as transformers reads them, blind to special tokens in text, told apart."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from slow_render import KINDS, make_tokenizer
from text_recipes import text

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError
from outgrow.streaming import stretches
from outgrow.streaming.stretches import Stretch, pieces
from outgrow.streaming.tokenizer import TextTokenizer, check_tokenizer, copy_tokenizer, train

TEXTS = [text(seed, 300) for seed in range(20)] + ["Привет, мир! 你好，世界。\r\n\r\n\tx  y   z\n\n\n it's 12345 \n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers") / "trained"
    train(TEXTS, 400, path)
    return path


def change(folder: Path, to: Path, name: str, **keys: Any) -> Path:
    """A copy of a tokenizer's folder with keys of one of its files changed; None takes a key away."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    value = {**json.loads((to / name).read_text()), **keys}
    (to / name).write_text(json.dumps({key: value for key, value in value.items() if value is not None}))
    return to


def test_every_text_comes_back_and_eos_is_never_found_in_text(folder: Path) -> None:
    tokenizer = TextTokenizer(folder)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (400, 0)
    spelled = "before <|endoftext|> after"
    for original, token_ids in zip([*TEXTS, spelled, ""], tokenizer.encode([*TEXTS, spelled, ""]), strict=True):
        assert token_ids.dtype == np.uint16
        assert tokenizer.decode(token_ids[:-1]) == original
        assert token_ids[-1] == tokenizer.eos_token_id not in token_ids[:-1]


def test_transformers_reads_what_was_saved(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = TextTokenizer(folder)
    assert theirs.eos_token_id == ours.eos_token_id
    for original, token_ids in zip(TEXTS, ours.encode(TEXTS), strict=True):
        assert [*theirs(original)["input_ids"], theirs.eos_token_id] == token_ids.tolist()
        assert theirs.decode(token_ids[:-1].tolist()) == original


def test_training_is_deterministic_whatever_the_threads(folder: Path, tmp_path: Path) -> None:
    """In other processes: another hash seed, and one thread instead of all."""
    code = (
        "import json, pathlib, sys; from outgrow.streaming.tokenizer import train\n"
        "train(json.load(sys.stdin), 400, pathlib.Path(sys.argv[1]))"
    )
    for parallel in ("true", "false"):
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": parallel}
        out = tmp_path / parallel
        subprocess.run([sys.executable, "-c", code, str(out)], input=json.dumps(TEXTS), text=True, env=environment, check=True)
        for path in folder.iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes()


def test_too_little_text_for_the_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gives a vocabulary of 2.. tokens, not 1,000"):
        train(["hello hello"], 1000, tmp_path / "t")


@pytest.mark.parametrize("limit", [7, 64, 1000])
def test_pieces_lose_nothing_and_change_no_token(folder: Path, limit: int) -> None:
    """The slow twin is the whole text encoded at once; with pieces longer than any word the tokens are the same."""
    tokenizer = TextTokenizer(folder)
    whole = "\n".join(TEXTS) + " " * 50 + "\n" * 30 + "end of it all"
    parts = list(pieces(whole, limit))
    assert "".join(parts) == whole
    assert all(0 < len(part) <= limit for part in parts)
    if limit >= 200:
        of_parts = np.concatenate([token_ids[:-1] for token_ids in tokenizer.encode(parts)])
        np.testing.assert_array_equal(of_parts, tokenizer.encode([whole])[0][:-1])


def test_pieces_of_text_without_breaks_are_still_bounded() -> None:
    assert [len(part) for part in pieces("x" * 10_000_000, 1_000_000)] == [1_000_000] * 10


def test_a_tokenizer_folder_that_cannot_be_used_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no tokenizer.json"):
        TextTokenizer(tmp_path / "empty")
    with pytest.raises(DataError, match="cannot be read"):
        TextTokenizer(change(folder, tmp_path / "broken", "tokenizer.json", model={"type": "BPE"}))
    foreign = change(folder, tmp_path / "foreign", "special_tokens_map.json", eos_token="</s>")  # which transformers heeds more
    with pytest.raises(DataError, match="'</s>' is not in the vocabulary"):
        TextTokenizer(foreign)
    silent = change(folder, tmp_path / "silent", "tokenizer_config.json", eos_token=None)
    (silent / "special_tokens_map.json").unlink()
    with pytest.raises(DataError, match="does not say which token ends"):
        TextTokenizer(silent)


def test_eos_may_be_spelled_as_an_object(folder: Path, tmp_path: Path) -> None:
    given = change(
        folder, tmp_path / "object", "tokenizer_config.json", eos_token={"content": "<|endoftext|>", "lstrip": False}
    )
    assert TextTokenizer(given).eos_token_id == 0


def test_padding_truncation_and_spaces_change_neither_tokens_nor_fingerprint(folder: Path, tmp_path: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    limited = tmp_path / "limited"
    limited.mkdir()
    cut = {"truncation": {"max_length": 5, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}}
    (limited / "tokenizer.json").write_text(json.dumps({**value, **cut}, indent=7))
    (limited / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert len(TextTokenizer(limited).encode(TEXTS[:1])[0]) > 5
    (limited / "tokenizer.json").write_text(json.dumps(value, indent=7))
    assert TextTokenizer(limited).fingerprint == TextTokenizer(folder).fingerprint


def test_a_copy_takes_the_tokenizer_out_of_a_model_folder(folder: Path, tmp_path: Path) -> None:
    model = change(folder, tmp_path / "model", "tokenizer_config.json")
    (model / "model.safetensors").write_bytes(b"weights")
    copied = copy_tokenizer(model, tmp_path / "copy")
    assert copied.fingerprint == TextTokenizer(folder).fingerprint
    assert sorted(path.name for path in (tmp_path / "copy").iterdir()) == sorted(path.name for path in folder.iterdir())


def test_a_tokenizer_that_does_not_match_the_dataset_is_refused_with_both_fingerprints(folder: Path, tmp_path: Path) -> None:
    fitting = TextTokenizer(folder)
    other = train(TEXTS[:10], 350, tmp_path / "other")
    card = DatasetCard(
        store="datasets/a",
        store_fingerprint="a",
        tokenizer_fingerprint=fitting.fingerprint,
        vocab_size=400,
        eos_token_id=0,
        bytes=1,
        indexes=(),
    )
    check_tokenizer(card, folder)
    with pytest.raises(DataError) as caught:
        check_tokenizer(card, tmp_path / "other")
    assert fitting.fingerprint[:16] in str(caught.value) and other.fingerprint[:16] in str(caught.value)
    with pytest.raises(DataError, match="end of text 5"):
        check_tokenizer(dataclasses.replace(card, eos_token_id=5), folder)


# --- as transformers reads a folder -----------------------------------------------------------------------------------


def test_named_tokens_are_those_of_transformers(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    given = change(
        folder, tmp_path / "a", "tokenizer_config.json", bos_token="<|endoftext|>", pad_token=None, eos_token="alpha"
    )
    given = change(given, tmp_path / "b", "special_tokens_map.json", unk_token={"content": "<|endoftext|>", "lstrip": False})
    named = TextTokenizer(given).named_tokens
    theirs = AutoTokenizer.from_pretrained(given).special_tokens_map
    assert {name: token for name, token in named.items() if token} == theirs
    assert named["eos_token"] == "<|endoftext|>"  # the map goes before the config
    decoder = {"0": {"content": "<|endoftext|>", "special": True}}
    given = change(given, tmp_path / "c", "tokenizer_config.json", added_tokens_decoder=decoder, eos_token="<|endoftext|>")
    assert "unk_token" not in TextTokenizer(given).named_tokens  # but for a config that lists its tokens


def test_a_space_before_the_text_is_added_where_transformers_adds_it(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    form = json.loads((folder / "tokenizer.json").read_text())
    fingerprints = set()
    for config in (False, True):
        given = change(folder, tmp_path / str(config), "tokenizer_config.json", add_prefix_space=config)
        form["pre_tokenizer"]["add_prefix_space"] = not config
        (given / "tokenizer.json").write_text(json.dumps(form))
        ours = TextTokenizer(given)
        fingerprints.add(ours.fingerprint)
        assert AutoTokenizer.from_pretrained(given)("alpha")["input_ids"] == ours.encode(["alpha"])[0].tolist()[:-1]
        assert ours.decode(ours.encode(["alpha"])[0][:-1]) == ("alpha", " alpha")[config]
    assert len(fingerprints) == 2


def test_a_named_token_of_the_vocabulary_is_special(folder: Path, tmp_path: Path) -> None:
    given = change(folder, tmp_path / "a", "special_tokens_map.json", pad_token="alpha", sep_token="not there")
    tokenizer = TextTokenizer(given)
    assert {token.content for token in tokenizer.added_tokens.values() if token.special} == {"<|endoftext|>", "alpha"}
    assert tokenizer.vocab_size == 400
    (made,) = tokenizer.encode(["an alpha of alphas"])
    assert tokenizer.token_id("alpha") not in made and tokenizer.decode(made[:-1]) == "an alpha of alphas"


# --- stretches --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextTokenizer]:
    root = tmp_path_factory.mktemp("kinds")
    return {kind: TextTokenizer(make_tokenizer(kind, root / kind)) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_of_a_text_go_on_without_a_space_of_their_own(
    kinds: dict[str, TextTokenizer], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow twin is the whole text at once."""
    whole_text, tag = "\n".join(TEXTS[:3]), 5
    for after_token in (False, True):
        whole = kinds[kind].encode_stretches([Stretch(whole_text, after_token)])[0].token_ids
        with monkeypatch.context() as context:
            context.setattr(stretches, "PIECE_CHARS", 300)
            made = kinds[kind].encode_stretches([Stretch(whole_text, after_token)])[0].token_ids
            assert kinds[kind].encode([whole_text], tag=tag if after_token else None)[0].tolist() == [
                *([tag] if after_token else []),
                *made,
                kinds[kind].eos_token_id,
            ]
        assert made == whole


@pytest.mark.parametrize("kind", KINDS)
def test_marks_are_where_their_tokens_begin(
    kinds: dict[str, TextTokenizer], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow twin reads the offsets of all tokens."""
    tokenizer = kinds[kind]
    for written in (TEXTS[0][:150], " Привет, мир!\n\n  你好 🙂 x", "assistant\n\nHello \n\n there", "", "a"):
        marks = tuple(range(len(written) + 1))
        (made,) = tokenizer.encode_stretches([Stretch(written, marks=marks)])
        encoding = tokenizer._tokenizer.encode(written, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        assert made.token_ids.tolist() == encoding.ids
        assert made.marks == [
            next((n for n, start in enumerate(starts) if start >= mark and mark), 0 if not mark else len(starts))
            for mark in marks
        ]
        monkeypatch.setattr(stretches, "PIECE_CHARS", 30)
        (pieced,) = tokenizer.encode_stretches([Stretch(written, marks=marks)])
        monkeypatch.undo()
        if pieced.token_ids == made.token_ids:
            assert pieced.marks == made.marks


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_spelled_out_in_text(kinds: dict[str, TextTokenizer], kind: str) -> None:
    tokenizer = kinds[kind]
    special = {
        token.content: number for number, token in tokenizer.added_tokens.items() if token.special and token.content != "<unk>"
    }
    written = "a" + "".join(special) + "b " + " ".join(special) + "".join(special) * 3
    (made,) = tokenizer.encode_stretches([Stretch(written, marks=(1, 5, 20))])
    assert not set(special.values()) & set(made.token_ids)
    assert tokenizer.decode(np.array(made.token_ids)).strip() == written
    (whole,) = tokenizer.encode([written])
    assert whole.tolist() == [*made.token_ids, tokenizer.eos_token_id]
