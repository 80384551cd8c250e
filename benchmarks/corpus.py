"""Text for the benchmarks of the build: Python's own library, cut anew at each pass so that no two documents are equal."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site


def library_texts(num_bytes: int) -> Iterator[str]:
    """Documents of about ``num_bytes`` in all: pass k over the library begins each file at another line, and says so."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    files = [path for path in files if not {"site-packages", "test", "tests", "lib2to3"} & set(path.parts)]
    written = turn = 0
    while True:
        for path in files:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            start = turn * 7 % max(len(lines), 1)
            text = f"# {path.name}, pass {turn}\n" + "".join(lines[start:] + lines[:start])
            yield text
            written += len(text.encode())
            if written >= num_bytes:
                return
        turn += 1


def write_jsonl(path: Path, num_bytes: int) -> None:
    """JSON lines with a little metadata, zstd-compressed where the name says so."""
    import zstandard

    with zstandard.open(path, "wt") if path.suffix == ".zst" else open(path, "w", encoding="utf-8") as file:
        for number, text in enumerate(library_texts(num_bytes)):
            file.write(json.dumps({"text": text, "number": number}) + "\n")


def recipe_of(streams: list[dict[str, Any]], tokenizer: dict[str, Any]) -> Recipe:
    """A recipe with the given streams and tokenizer, all else as small as can be."""
    data = {"sequence_length": 2048, "tokenizer": tokenizer, "streams": streams}
    return Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "benchmark", "seed": 1},
            "model": {"kind": "architecture", "family": "llama"},
            "data": data,
            "batch": {"rows": 8},
            "duration": {"tokens": 1_000_000},
            "optimizer": {"kind": "adamw", "learning_rate": 0.001},
        }
    )


def site_of(root: Path, sources: dict[str, Path], processes: int) -> Site:
    """A site below ``root``."""
    names = {name: str(path) for name, path in sources.items()}
    return Site.model_validate(
        {"storage": str(root / "storage"), "cache": str(root / "cache"), "sources": names, "build_processes": processes}
    )
