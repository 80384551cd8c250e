"""Which chat template a stream has, and which special tokens it needs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeAlias

from outgrow.errors import DataError
from outgrow.recipes.schema.data import Data, FolderTokenizer
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema.sources import CustomSource, TextShape
from outgrow.recipes.schema.streams import FileTemplate, NamedTemplate, Stream, TokenizerTemplate
from outgrow.streaming.render.named_templates import TEMPLATES
from outgrow.streaming.tokenizer_form import named_tokens
from outgrow.streaming.tokenizer_template import own_template

JsonDict: TypeAlias = dict[str, Any]

_NEEDED = re.compile(r"\{#-?\s*special tokens:([^#]*?)-?#\}")


def template_text(stream: Stream, site: Site, folder: Path) -> str | None:
    """The Jinja text of a stream's chat template; ``folder`` holds the tokenizer, prepared or as it came.

    None where the stream has no dialogues. Raises ``DataError`` where it has, and there is no template.
    """
    if not may_have_dialogues(stream):
        return None
    match stream.chat.template:
        case NamedTemplate() as named:
            return TEMPLATES[named.name]
        case FileTemplate() as file:
            return _read(Path(site.locate(file.path)))
        case TokenizerTemplate():
            text = own_template(folder)
            if text is None and not isinstance(stream.source, CustomSource):  # which may yield texts alone
                raise DataError(
                    "the tokenizer has no chat template, and the stream has dialogues",
                    where=f"data.streams: {stream.name}",
                    hint="set chat.template of the stream: {kind: named, name: chatml}, or a file of yours",
                )
            return text


def template_identity(data: Data, site: Site) -> JsonDict:
    """What of chat templates decides the tokens of a dataset, beside the recipe's own words: the text of each stream's
    template, and the tokens that the tokenizer names; empty where no stream has dialogues."""
    streams = [stream for stream in data.streams if may_have_dialogues(stream)]
    given = Path(site.locate(data.tokenizer.path)) if isinstance(data.tokenizer, FolderTokenizer) else None
    if not streams:
        return {}
    own = [stream for stream in streams if given is None and isinstance(stream.chat.template, TokenizerTemplate)]
    return {
        "templates": {s.name: None if s in own else template_text(s, site, given or Path()) for s in streams},
        "tokens": named_tokens(given) if given else {},
    }


def may_have_dialogues(stream: Stream) -> bool:
    """Whether documents of a stream can be dialogues or preference pairs."""
    return isinstance(stream.source, CustomSource) or not isinstance(getattr(stream.source, "shape", TextShape()), TextShape)


def needed_tokens(template: str) -> tuple[str, ...]:
    """The special tokens that the comment at the beginning of a template names."""
    found = _NEEDED.match(template.lstrip())
    return tuple(found[1].split()) if found else ()


def _read(path: Path) -> str:
    if not path.is_file():
        raise DataError("there is no such file", where=str(path), hint="a chat template is a Jinja file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"the chat template is not UTF-8: {error}", where=str(path)) from None
