"""Families that ``outgrow model check`` has passed on this machine, remembered in a small JSON file under the site's cache.

A pass is of one family under one version of transformers and torch; other versions are other probes.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from outgrow.errors import ModelError
from outgrow.storage import Storage
from outgrow.trainers.models.families import TESTED

_FILE = "checked-models.json"


def require_checked(model_type: str, cache: Path, where: str = "model.family") -> None:
    """Raise ``ModelError`` for a family that is neither tested nor has passed the probes with the installed versions.

    ``where`` says where the family was read.
    """
    if model_type in TESTED or model_type in checked(cache):
        return
    raise ModelError(
        f"{model_type} has not been checked with {_versions()}; tested are {', '.join(TESTED)}",
        where=where,
        hint=f"run: outgrow model check {model_type}",
    )


def checked(cache: Path) -> list[str]:
    """Families that passed with the installed versions."""
    return sorted(_read(cache).get(_versions(), []))


def remember(model_type: str, cache: Path) -> None:
    """Note that a family passed with the installed versions."""
    known = _read(cache)
    known[_versions()] = sorted({*known.get(_versions(), []), model_type})
    Storage(str(cache)).write_json(_FILE, known)


def _versions() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def _read(cache: Path) -> dict[str, list[str]]:
    path = cache / _FILE
    if not path.is_file():
        return {}
    try:
        known: dict[str, list[str]] = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(
            f"not JSON: {error}", where=str(path), hint="delete the file and run outgrow model check again"
        ) from error
    return known
