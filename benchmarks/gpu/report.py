"""The file of results, written anew with every line of a section, so that a process that is killed leaves what it had."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

UNFINISHED = "*Not finished: what follows was not measured.*"


class Report:
    """The section ``title`` of the file ``path``, whose other sections stay as they are; of no file where it is None.

    ``about`` says how the section came about. Every line goes to stderr too.
    """

    def __init__(self, path: Path | None, title: str, about: str) -> None:
        self._path, self._title = path, title
        self._others = sections_of(path.read_text()) if path is not None and path.exists() else {}
        self._lines: list[str] = []
        self._start = time.monotonic()
        self._say(f"## {title}")
        for line in (about, ""):
            self.add(line)

    def add(self, line: str) -> None:
        self._lines.append(line)
        self._say(line)
        self._write([*self._lines, "", UNFINISHED])

    def end(self, fault: str = "") -> None:
        """Nothing follows; ``fault``: the error that it ended with."""
        if fault:
            self.add("")
            self.add(f"Ended early: {fault}")
        self._write(self._lines)

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._start:4.0f} s] {line}", file=sys.stderr, flush=True)

    def _write(self, lines: list[str]) -> None:
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_name(f"{self._path.name}.new")
        new.write_text(text_of({**self._others, self._title: "\n".join(lines)}))
        os.replace(new, self._path)


def sections_of(text: str) -> dict[str, str]:
    """What stands under each title of a file that ``text_of`` made."""
    found = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        found[title] = body.strip()
    return found


def text_of(sections: Mapping[str, str]) -> str:
    """Markdown of all sections."""
    parts = [f"## {title}\n\n{body.strip()}\n" for title, body in sections.items()]
    return "\n".join(["# One GPU: speed and memory\n\nGB are 1e9 bytes.\n", *parts])
