"""Recipes and sites for tests of the build: small text, everything below one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu")


def text(seed: int, num_words: int) -> str:
    """Words in lines, another text for each seed."""
    state, words = seed * 2654435761 % 2**32, []
    for _ in range(num_words):
        state = (state * 1664525 + 1013904223) % 2**32
        words.append(WORDS[(state >> 16) % len(WORDS)] + str(state >> 22))
    return "\n".join(" ".join(words[i : i + 9]) for i in range(0, num_words, 9)) + "\n"


def write_texts(folder: Path, count: int, *, num_words: int = 60) -> Path:
    """``count`` text files in ``folder``."""
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:03}.txt").write_text(text(number, num_words))
    return folder


def make_recipe(*streams: dict[str, Any], seed: int = 1, **data: Any) -> Recipe:
    """A recipe of the given streams; ``data`` overrides the section's keys."""
    section = {
        "sequence_length": 16,
        "tokenizer": {"kind": "train", "vocab_size": 300, "sample_bytes": 100_000},
        "validation_fraction": 0.2,
        "streams": list(streams),
        **data,
    }
    return Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "test", "seed": seed},
            "model": {"kind": "architecture", "family": "llama"},
            "data": section,
            "batch": {"rows": 4},
            "duration": {"tokens": 1000},
            "optimizer": {"kind": "adamw", "learning_rate": 0.001},
        }
    )


def text_stream(name: str = "prose", **source: Any) -> dict[str, Any]:
    return {"name": name, "source": {"kind": "text", "path": name, **source}}


def make_site(root: Path, *, storage: str = "", build_processes: int = 1, **sources: Path) -> Site:
    """A site below ``root`` whose names are the given folders."""
    return Site.model_validate(
        {
            "storage": storage or str(root / "storage"),
            "cache": str(root / "cache"),
            "sources": {name: str(path) for name, path in sources.items()},
            "build_processes": build_processes,
            "monitoring": {"agent": False, "folder": str(root / "monitoring")},
        }
    )
