"""What a recipe adds to its tokenizer: tags, the special tokens of chat templates, and the template that goes out with the
model.

A dataset has one tokenizer and the tokenizer one stored template: that of the first stream with dialogues. Other streams may
have others; what is learned of them is right, and an exported model applies the stored one.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer  # type: ignore[import-untyped]

from outgrow.contracts import DatasetCard
from outgrow.recipes.schema.data import Data
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema.streams import TokenizerTemplate
from outgrow.streaming.render.templates import may_have_dialogues, needed_tokens, template_text
from outgrow.streaming.tokenizer import check_tokenizer, copy_tokenizer
from outgrow.streaming.tokenizer_form import named_tokens, spellings
from outgrow.streaming.tokenizer_template import KEPT_TEMPLATE, TEMPLATE, own_template

_MORE_TOKENS = "additional_special_tokens"


def prepare_tokenizer(folder: Path, data: Data, site: Site) -> None:
    """Add the tags and tokens that the recipe's streams need to the tokenizer in ``folder``, and store the chat template there.

    A tokenizer that lacks nothing stays as it is, byte for byte. Raises ``DataError`` where a stream has dialogues and no
    template.
    """
    streams = [stream for stream in data.streams if may_have_dialogues(stream)]
    templates = [(stream, template_text(stream, site, folder)) for stream in streams]
    tokens = [stream.tag for stream in data.streams if stream.tag]
    tokens += [token for _, text in templates if text is not None for token in needed_tokens(text)]
    _add_tokens(folder, list(dict.fromkeys(tokens)))
    stored = next(((stream, text) for stream, text in templates if text is not None), None)
    if stored is not None and not isinstance(stored[0].chat.template, TokenizerTemplate):
        own = own_template(folder)
        if own is not None and any(isinstance(stream.chat.template, TokenizerTemplate) for stream in streams):
            (folder / KEPT_TEMPLATE).write_text(own, encoding="utf-8")
        (folder / TEMPLATE).write_text(stored[1], encoding="utf-8")
        _change(folder / "tokenizer_config.json", lambda config: config.pop("chat_template", None))


def check_model_tokenizer(card: DatasetCard, folder: Path, data: Data, site: Site) -> None:
    """Raises ``DataError`` where the tokenizer in a model's ``folder``, with what the recipe adds to it, is not the
    dataset's."""
    with tempfile.TemporaryDirectory(prefix="outgrow-tokenizer-") as name:
        prepared = Path(name) / "tokenizer"
        copy_tokenizer(folder, prepared)
        prepare_tokenizer(prepared, data, site)
        check_tokenizer(card, prepared)


def _add_tokens(folder: Path, wanted: Sequence[str]) -> None:
    """Make each of ``wanted`` a special token, in every file that lists such."""
    path = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    absent = [token for token in wanted if token not in special]
    if not absent:
        return
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in absent])
    tokenizer.save(str(path))
    named = set(spellings(named_tokens(folder)))
    entries = {str(tokenizer.token_to_id(token)): _entry(token) for token in absent}

    def name_them(config: dict[str, Any]) -> None:
        config[_MORE_TOKENS] = [*(config.get(_MORE_TOKENS) or []), *(token for token in absent if token not in named)]
        if "added_tokens_decoder" in config:
            config["added_tokens_decoder"] |= entries

    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        _change(folder / name, name_them)
    _change(
        folder / "added_tokens.json", lambda ids: ids.update({entry["content"]: int(key) for key, entry in entries.items()})
    )


def _entry(token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": token, **flags, "special": True}


def _change(path: Path, change: Any) -> None:
    """Make a change to the JSON object of a file; nothing where there is no file, or where it is the same afterwards."""
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    value = json.loads(text)
    change(value)
    if value != json.loads(text):
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
