"""Source ``pdf``: the text of PDF files, each one document, page after page; PDFium reads them in a process of its own."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from outgrow.errors import DataError
from outgrow.recipes.schema.sources import PdfSource
from outgrow.streaming.sources.document import MAX_DOCUMENT_BYTES, BadRecordError, Document

MAX_PAGES = 50_000
"""Pages of one file, at most."""


@dataclass(frozen=True, kw_only=True)
class PdfReader:
    """A document a file."""

    def read(self, path: Path, name: str) -> Iterator[Document]:
        found = _process.ask({"path": str(path.resolve()), "max_pages": MAX_PAGES, "max_chars": MAX_DOCUMENT_BYTES})
        if "errno" in found:
            raise OSError(found["errno"], found["error"], str(path))
        if "error" in found:
            raise BadRecordError(found["error"])
        if not found["text"]:
            pages = f"none of its {found['pages']:,} pages has text" if found["pages"] else "it has no pages"
            raise BadRecordError(f"{pages}: a scan; make its text by OCR first", reason="empty")
        meta: dict[str, Any] = {"title": found["title"], "authors": [found["author"]] if found["author"] else []}
        meta |= {"pages": found["pages"], "pages_without_text": found["pages_without_text"]}
        yield Document(content=found["text"], source=name, meta={key: value for key, value in meta.items() if value})


def reader(source: PdfSource) -> PdfReader:
    """How files of the source are read."""
    return PdfReader()


class _Process:
    """The process that reads PDF files for this one; it is started when it is needed, and again where a file killed it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Its answer. Raises ``BadRecordError`` where the file made it end."""
        with self._lock:
            process = self._started()
            try:
                cast(IO[bytes], process.stdin).write(json.dumps(request).encode() + b"\n")
                cast(IO[bytes], process.stdin).flush()
                answer = _received(process)
            except BrokenPipeError:
                answer = None
            if answer is None:
                raise BadRecordError(f"the PDF library could not read it: {self._end()}")
            return answer

    def close(self) -> None:
        """Ends it."""
        if self._running is not None and self._owner == os.getpid():
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._running is None or self._owner != os.getpid():  # after a fork it belongs to the process that we came from
            program = Path(__file__).with_name("pdf_pages.py")
            self._running = subprocess.Popen(
                [sys.executable, "-P", str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._owner = os.getpid()
            if _received(self._running) is None:
                raise DataError(f"the process that reads PDF files does not start: {self._end()}", where=str(program))
        return self._running

    def _end(self) -> str:
        """Ends the process, and says how it had ended where it had."""
        process, self._running = cast("subprocess.Popen[bytes]", self._running), None
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(BrokenPipeError):  # of what it never read
                cast(IO[bytes], pipe).close()
        code = process.wait()
        if code == -signal.SIGXCPU:
            return "it takes too much processor time"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"
        return f"it ended with {how}; the file is damaged, or takes too much memory"


def _received(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    """The next answer, None where there is none."""
    stdout = cast(IO[bytes], process.stdout)
    length = stdout.read(8)
    if len(length) < 8:
        return None
    size = int.from_bytes(length, "little")
    data = stdout.read(size)
    return cast("dict[str, Any]", json.loads(data)) if len(data) == size else None


_process = _Process()
atexit.register(_process.close)
