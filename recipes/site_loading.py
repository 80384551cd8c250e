"""From site.yaml to a ``Site`` whose folders are absolute, and from a recipe's names to those folders."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError

from outgrow.errors import Problem, RecipeError, SiteError
from outgrow.recipes.explain import explain, in_order
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.options import SECRET_NAME
from outgrow.recipes.schema.section import Mark, Section
from outgrow.recipes.schema.site import Site
from outgrow.recipes.schema_types import field_type, follow
from outgrow.recipes.yaml_marks import Document, KeyPath, key_path, key_text, read, strings

STANDARD_LIBRARY = "python-stdlib"
"""The one source that every site has: the library of the Python that is running."""

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


def find_site(explicit: Path | None, folder: Path) -> Path | None:
    """The site file to use: ``explicit``, else ``folder``/site.yaml, else the user's own; None where there is none."""
    if explicit is not None:
        return explicit
    return next((path for path in (folder / "site.yaml", user_site()) if path.is_file()), None)


def user_site() -> Path:
    """Where the user's own site file lies, or would lie."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "outgrow" / "site.yaml"


def load_site(path: Path | None) -> Site:
    """The site of a file, or of the built-in defaults; every folder in it is absolute or a URL.

    Relative folders are relative to the file. Raises ``SiteError`` with every problem, each with its place.
    """
    document = Document(data={}, places={(): "built-in defaults"}) if path is None else read(path, SiteError)
    data, problems = _fill_in(document, os.environ)
    try:
        site = Site.model_validate(_with_tuples(data), strict=True)
    except ValidationError as error:
        problems += explain(error, document, Site)
    if problems:
        raise SiteError([_without_values(problem, document) for problem in in_order(problems, document)])
    return _with_folders(site, Path.cwd() if path is None else path.absolute().parent)


def bind(site: Site, recipe: Recipe, recipe_path: Path) -> Site:
    """The site with a folder under ``sources`` for every name that the recipe uses.

    A name that the site does not know is a path relative to the recipe. Raises ``SiteError`` with all that are neither.
    """
    sources, missing = dict(site.sources), list[tuple[str, str]]()
    folder = recipe_path.absolute().parent
    known = ", ".join(sorted(site.sources))
    for key, name in recipe_names(recipe):
        if name in site.sources:
            continue
        path = Path(os.path.normpath(folder / name))
        if path.exists():
            sources[name] = str(path)
        else:
            missing.append((key, f"no source '{name}', and nothing at {path}; known: {known}"))
    if missing:
        document = read(recipe_path, RecipeError)
        problems = [Problem(where=document.where(key_path(key)), key=key, message=message) for key, message in missing]
        raise SiteError(problems, hint="add them under sources: in site.yaml, each as name: /folder")
    return site.model_copy(update={"sources": sources})


def recipe_names(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Every (key path, name) of a recipe that stands for a folder or file of the site."""
    return _names(recipe, "")


def _names(section: Section, key: str) -> Iterator[tuple[str, str]]:
    for name, info in type(section).model_fields.items():
        value, here = getattr(section, name), f"{key}.{info.alias or name}".removeprefix(".")
        if isinstance(value, Section):
            yield from _names(value, here)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                if isinstance(item, Section):
                    yield from _names(item, f"{here}[{index}]")
        elif Mark.NAME in field_type(info).marks:
            yield here, value


def _fill_in(document: Document, environment: Mapping[str, str]) -> tuple[Any, list[Problem]]:
    """The data with every ``${env:NAME}`` filled in, secrets as ``SecretStr``, and what is wrong with them."""
    data, problems = copy.deepcopy(document.data), list[Problem]()
    for path, text in strings(document.data):
        place = follow(Site, path)
        marks = place.holds.marks if place.holds is not None and place.path == path else frozenset()
        message = ""
        if "${" in text:
            message = _wrong_variable(text, marks, environment)
            if not message:
                filled = _VARIABLE.sub(lambda match: environment[match[1].removeprefix("env:")], text)
                _set(data, path, SecretStr(filled) if Mark.SECRET in marks else filled)
        elif Mark.SECRET in marks and SECRET_NAME.search(str(path[-1])):
            message = "a secret does not stand in a file; write ${env:NAME} and set NAME in the environment"
        if message:
            problems.append(Problem(where=document.where(path), key=key_text(path), message=message))
    return data, problems


def _with_tuples(data: Any) -> Any:
    """The data with a tuple for every list, as strict mode wants them."""
    if isinstance(data, dict):
        return {key: _with_tuples(value) for key, value in data.items()}
    return tuple(map(_with_tuples, data)) if isinstance(data, list) else data


def _wrong_variable(text: str, marks: frozenset[Mark], environment: Mapping[str, str]) -> str:
    if not marks:
        return "${env:NAME} is for folders and secrets alone; write the value"
    for inside in _VARIABLE.findall(text):
        name = inside.removeprefix("env:")
        if name == inside:
            return f"${{{inside}}} is not known; allowed: ${{env:{inside or 'NAME'}}}"
        if not environment.get(name):
            return f"the environment variable {name} is not set"
    return "" if text.count("${") == len(_VARIABLE.findall(text)) else "'${' is not closed; allowed: ${env:NAME}"


def _without_values(problem: Problem, document: Document) -> Problem:
    """The problem with the values of environment variables taken out again: what they hold is never shown."""
    message = problem.message
    for _, text in strings(document.data):
        for inside in _VARIABLE.findall(text):
            value = os.environ.get(inside.removeprefix("env:"))
            message = message.replace(value, f"${{{inside}}}") if value else message
    return dataclasses.replace(problem, message=message)


def _with_folders(site: Site, folder: Path) -> Site:
    """The site with ``~`` and paths relative to ``folder`` made absolute, and the built-in source added."""
    data = site.model_dump(by_alias=True)
    for path, text in strings(data):
        place = follow(Site, path)
        if text and place.holds is not None and Mark.LOCATION in place.holds.marks and "://" not in text:
            # os.path leaves a ``~name`` that no user has as it is, a folder of that name.
            _set(data, path, os.path.normpath(folder / os.path.expanduser(text)))
    data["sources"].setdefault(STANDARD_LIBRARY, sysconfig.get_path("stdlib"))
    return Site.model_validate(data)


def _set(data: Any, path: KeyPath, value: Any) -> None:
    for part in path[:-1]:
        data = data[part]
    data[path[-1]] = value
