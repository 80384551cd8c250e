"""tokenizer.json as datasets use it: what transformers would make of it, and its variants for text that goes on.

Tokenizers of the SentencePiece kind put a space before a text. Some do so at its very beginning only (Mistral, newer Llamas),
some after each special token too; none does it in the middle of a text that is encoded in pieces.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from tokenizers import AddedToken, Tokenizer  # type: ignore[import-untyped]

from outgrow.errors import DataError

JsonDict: TypeAlias = dict[str, Any]

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_TOKENS = "additional_special_tokens"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def read_form(folder: Path) -> JsonDict:
    """tokenizer.json of a folder, with ``add_prefix_space`` of its tokenizer_config.json, which transformers heeds.

    Raises ``DataError`` where there is none, or where it cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            "there is no tokenizer.json in the folder", where=str(folder), hint="save the tokenizer in its fast form first"
        )
    form = _read_object(path)
    own, wanted = form.get("pre_tokenizer") or {}, bool(_config(folder).get("add_prefix_space"))
    if own.get("add_prefix_space", wanted) != wanted:
        form["pre_tokenizer"] = {**own, "add_prefix_space": wanted}
    return form


def named_tokens(folder: Path) -> JsonDict:
    """``bos_token``, ``eos_token`` and so on, texts, and ``additional_special_tokens``, a list of texts: those that
    tokenizer_config.json and special_tokens_map.json of the folder name, as transformers reads the two. One that is null
    there is empty."""
    config = _config(folder)
    if "added_tokens_decoder" not in config:
        config |= _read_object(folder / "special_tokens_map.json")
    named: JsonDict = {name: _spelling(config[name]) if config[name] else "" for name in _NAMED_TOKENS if name in config}
    more = config.get(_MORE_TOKENS)
    if isinstance(more, list) and more:
        named[_MORE_TOKENS] = [_spelling(token) for token in more]
    return named


def spellings(named: JsonDict) -> Iterator[str]:
    """Each text of ``named_tokens``."""
    for token in named.values():
        yield from token if isinstance(token, list) else [token] if token else []


def load(form: JsonDict, named: JsonDict, where: Path) -> Tokenizer:
    """The tokenizer: no padding, no truncation, nothing added, no special token found in text; tokens of ``named`` that the
    vocabulary has are special.

    The offsets of its encodings are whole: white space that belongs to a token is not left out.
    """
    try:
        tokenizer = Tokenizer.from_str(json.dumps({**form, "truncation": None, "padding": None, "post_processor": None}))
    except Exception as error:  # noqa: B902  (the library raises nothing narrower)
        raise DataError(f"tokenizer.json cannot be read: {error}", where=str(where)) from None
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    absent = [text for text in spellings(named) if text not in special and tokenizer.token_to_id(text) is not None]
    if absent:
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in absent])
    tokenizer.encode_special_tokens = True
    return tokenizer


def reachable_specials(form: JsonDict, special: dict[str, int]) -> frozenset[int]:
    """Ids of special tokens that the model itself makes of plain text: those that it has as pieces like any other.

    The token for what is unknown is none of them: text may well hold the unknown.
    """
    model = form["model"]
    unknown = model.get("unk_token"), model.get("unk_id")
    vocabulary = model.get("vocab") or {}
    pieces = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    if model.get("type", "BPE") == "BPE" and not model.get("ignore_merges"):  # pieces are single letters, or merged
        merged = ("".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model.get("merges") or ())
        pieces = {piece for piece in pieces if len(piece) == 1}.union(merged)
    return frozenset(
        number for text, number in special.items() if text in pieces and text != unknown[0] and number != unknown[1]
    )


def after_token(form: JsonDict) -> JsonDict:
    """The tokenizer for text that follows a special token."""
    return _changed(form, lambda part: {**part, "prepend_scheme": "never"} if part.get("prepend_scheme") == "first" else part)


def going_on(form: JsonDict) -> JsonDict:
    """The tokenizer for text that follows other text: it puts no space before it."""

    def change(part: JsonDict) -> JsonDict | None:
        match part.get("type"):
            case "Metaspace":
                return {**part, "prepend_scheme": "never"}
            case "ByteLevel":
                return {**part, "add_prefix_space": False}
            case "Prepend":
                return None
        return part

    return _changed(form, change)


def needed_later(form: JsonDict) -> JsonDict:
    """The form where a variant of it differs; else its small parts alone, for a vocabulary takes much memory."""
    if after_token(form) is not form or going_on(form) is not form:
        return form
    return {key: form.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")}


def token_texts(form: JsonDict, vocabulary: dict[str, int], added: Iterable[int]) -> dict[int, str]:
    """The text that each token of a vocabulary stands for within a text, by id; bytes that are no whole characters are
    replaced.

    ``added`` tokens are spelled as they are.
    """
    kinds = set(_types(form.get("decoder"))) | set(_types(form.get("pre_tokenizer")))
    spelled = _of_bytes if "ByteLevel" in kinds else _of_word_piece if "WordPiece" in kinds else _of_sentence_piece
    plain = set(added)
    return {token_id: token if token_id in plain else spelled(token) for token, token_id in vocabulary.items()}


def _of_bytes(token: str) -> str:
    try:
        return bytes([_BYTES[char] for char in token]).decode("utf-8", errors="replace")
    except KeyError:
        return token


def _of_sentence_piece(token: str) -> str:
    if byte := _BYTE.fullmatch(token):
        return bytes.fromhex(byte[1]).decode("utf-8", errors="replace")
    return token.replace("▁", " ")


def _of_word_piece(token: str) -> str:
    return token[2:] if token.startswith("##") else f" {token}"


def _types(part: Any) -> Iterator[str]:
    """Every ``type`` in a part of tokenizer.json."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        for item in part.values():
            yield from _types(item)
    elif isinstance(part, list):
        for item in part:
            yield from _types(item)


def _bytes_by_letter() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies (GPT-2): printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _bytes_by_letter()


def _changed(form: JsonDict, change: Any) -> JsonDict:
    """The tokenizer with ``change`` made to its normalizers and pre-tokenizers; itself where that makes no difference."""
    parts = {key: _with_each(form.get(key), change) for key in ("normalizer", "pre_tokenizer")}
    return form if all(form.get(key) == part for key, part in parts.items()) else {**form, **parts}


def _with_each(part: JsonDict | None, change: Any) -> JsonDict | None:
    if part is None:
        return None
    if part.get("type") != "Sequence":
        changed: JsonDict | None = change(part)
        return changed
    key = "normalizers" if "normalizers" in part else "pretokenizers"
    inner = [_with_each(item, change) for item in part[key]]
    return {**part, key: [item for item in inner if item is not None]}


def _config(folder: Path) -> JsonDict:
    return _read_object(folder / "tokenizer_config.json")


def _read_object(path: Path) -> JsonDict:
    """The JSON object of a file; empty where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise DataError(f"{path.name} cannot be read: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise DataError(f"{path.name} is no JSON object", where=str(path))
    return value


def _spelling(token: str | JsonDict) -> str:
    return token if isinstance(token, str) else str(token["content"])
