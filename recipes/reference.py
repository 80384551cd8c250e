"""The reference pages and JSON Schemas of recipe.yaml and site.yaml, made from the schema and its docstrings.

``python -m outgrow.recipes.reference`` rewrites them in docs/; a test fails when they are stale.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.section import Section
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema_types import describe, field_type, fields, type_of

DOCS = Path(__file__).resolve().parents[1] / "docs"

_RECIPE_INTRO = """\
A recipe says what is learned, and nothing of the machines it is learned on. `outgrow recipe check FILE` finds every mistake at
once; `key.path=value` after the file overrides a key (`data.streams[0].name=news`, values in YAML); unknown keys, duplicate
keys, tags and aliases are refused. `yes`, `no` and dates are text, `1e-3` and `1_000` are numbers. Where a section has kinds,
the kind alone is short for a section with nothing else: `clean: [nfc]`, `parallel: auto`."""

_SITE_INTRO = """\
A site says where runs go on a machine or cluster, and nothing of what is learned. It is the file of `--site`, else `site.yaml`
in the working folder, else `outgrow/site.yaml` in `$XDG_CONFIG_HOME` (`~/.config`), else the defaults below. `outgrow site
init` writes one; `outgrow site show` shows the one in use. Relative folders are relative to the file; `${env:NAME}` stands for
an environment variable in folders, URLs and `storage_options`."""


def files() -> dict[str, str]:
    """The text of every generated file, by its name in docs/."""
    return {
        "recipe.md": page(Recipe, "recipe.yaml", _RECIPE_INTRO),
        "recipe.schema.json": json.dumps(json_schema(Recipe), indent=1) + "\n",
        "site.md": page(Site, "site.yaml", _SITE_INTRO),
        "site.schema.json": json.dumps(json_schema(Site), indent=1) + "\n",
    }


def json_schema(section: type[Section]) -> dict[str, Any]:
    """The JSON Schema of a section, for editors; a tagged union may be given by its kind alone, see ``short_forms``."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_with_short_forms(section.model_json_schema())}


def _with_short_forms(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_with_short_forms(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: _with_short_forms(value) for key, value in schema.items()}
    if "discriminator" in schema:
        kinds = {"enum": list(schema["discriminator"]["mapping"])}
        schema = {"anyOf": [kinds, {key: schema.pop(key) for key in ("discriminator", "oneOf")}], **schema}
    return schema


def page(root: type[Section], title: str, introduction: str) -> str:
    """A Markdown page with every key of a schema: its type, default and meaning."""
    made = "<!-- made by python -m outgrow.recipes.reference; change the docstrings in recipes/schema instead -->"
    return "\n".join([made, "", f"# {title}", "", introduction, "", *_section(root, ""), ""]).rstrip() + "\n"


def _section(section: type[Section], key: str) -> Iterator[str]:
    """A table of the section's own keys, then every section below it."""
    yield "| key | allowed | default | meaning |"
    yield "|---|---|---|---|"
    below = list[tuple[str, FieldInfo, dict[str, type[Section]]]]()
    for name, info in sorted(fields(section).items(), key=lambda entry: entry[0] != "kind"):
        sections = _sections(info)
        yield _row(f"{key}.{name}".removeprefix("."), info, is_section=bool(sections))
        if sections:
            below.append((f"{key}.{name}".removeprefix("."), info, sections))
    for name, info, sections in below:
        item = "[]" if field_type(info).item is not None else ""
        for kind, option in sections.items():
            yield ""
            yield f"## {name}{item}" + (f", kind: {kind}" if kind else "")
            yield ""
            yield _plain(inspect.getdoc(option) or "")
            yield ""
            yield from _section(option, name + item)


def _sections(info: FieldInfo) -> dict[str, type[Section]]:
    """The sections that a field holds, by kind (``""`` where it holds just one); empty for a plain value."""
    holds = field_type(info)
    if holds.item is not None:
        holds = type_of(holds.item)
    if holds.section is not None:
        return {"": holds.section}
    return holds.variants


def _row(key: str, info: FieldInfo, *, is_section: bool) -> str:
    cells = [
        f"`{key}`",
        _plain(describe(field_type(info), info.description or "")),
        _default(info),
        _plain(info.description or ""),
    ]
    if is_section and field_type(info).item is None:
        cells[1] = f"{cells[1].split(' with ')[0]}, below"
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.default
    if isinstance(value, Section):
        value = value.model_dump(mode="json", exclude_unset=True) or value.model_dump(mode="json", include={"kind"})
        return ", ".join(f"`{key}: {item}`" for key, item in value.items()) or "its defaults"
    return "none" if value is None else f"`{json.dumps(value)}`".replace('"', "")


def _plain(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def main() -> None:
    for name, text in files().items():
        (DOCS / name).write_text(text)


if __name__ == "__main__":
    main()
