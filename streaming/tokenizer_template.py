"""The chat template that lies in a tokenizer's folder, wherever transformers keeps it: one text."""

from __future__ import annotations

import json
from pathlib import Path

from outgrow.errors import DataError

TEMPLATE = "chat_template.jinja"
KEPT_TEMPLATE = "tokenizer_chat_template.jinja"
"""The tokenizer's own template where a dataset's tokenizer stores that of a stream as ``chat_template.jinja``."""

_MORE = "additional_chat_templates"
_DEFAULT, _WITH_TOOLS = "default", "tool_use"


def own_template(folder: Path) -> str | None:
    """The tokenizer's own chat template, None where it has none.

    Where it has one for dialogues with tools and one for others, the text chooses between them as transformers does. Raises
    ``DataError`` where it has several and none is the usual one.
    """
    kept = folder / KEPT_TEMPLATE
    if kept.is_file():
        return _read(kept)
    templates = _templates(folder)
    if not templates:
        return None
    if _DEFAULT not in templates:
        raise DataError(
            f"there are chat templates {', '.join(sorted(templates))}, and none is called {_DEFAULT}",
            where=str(folder),
            hint="give one as a file: chat.template: {kind: file, path: ...}",
        )
    usual, with_tools = templates[_DEFAULT], templates.get(_WITH_TOOLS)
    if with_tools is None:
        return usual
    # The signs keep line breaks and spaces at the templates' ends, which Jinja would take away beside a block.
    return f"{{%- if tools +%}}{_ended(with_tools)}{{%+ else +%}}{_ended(usual)}{{%+ endif -%}}"


def has_template_files(folder: Path) -> bool:
    """Whether its templates lie in several files, the usual one among them."""
    return (folder / _MORE).is_dir() and _DEFAULT in _templates(folder)


def _templates(folder: Path) -> dict[str, str]:
    """All of them by name. Files go before what tokenizer_config.json holds."""
    files = {path.stem: path for path in sorted((folder / _MORE).glob("*.jinja"))}
    if (folder / TEMPLATE).is_file():
        files[_DEFAULT] = folder / TEMPLATE
    if files:
        return {name: _read(path) for name, path in files.items()}
    config = folder / "tokenizer_config.json"
    try:
        given = json.loads(config.read_text(encoding="utf-8")).get("chat_template") if config.is_file() else None
        if isinstance(given, list):
            return {str(item["name"]): str(item["template"]) for item in given}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"its chat_template cannot be read: {error}", where=str(config)) from None
    return {_DEFAULT: given} if isinstance(given, str) else {}


def _ended(template: str) -> str:
    """The template without the one line break at its end, which Jinja leaves out."""
    return template.removesuffix("\n")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8: {error}", where=str(path)) from None
