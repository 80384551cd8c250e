"""Reads PDF files in a process of its own: a program that ``pdf.py`` starts, asks and, where a file kills it, starts again.

PDFium is a large native library, and a broken file may crash it, make it loop, or take all memory. Here that costs one file:
this process limits its own memory and the processor time of each file. It imports nothing of outgrow. A request is a line of
JSON on standard input (``path``, ``max_pages``, ``max_chars``); an answer is its length (8 bytes, little endian) and JSON:
``error``, or ``text``, ``pages``, ``pages_without_text``, ``title`` and ``author``.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import pypdfium2  # type: ignore[import-untyped]
import pypdfium2.raw  # type: ignore[import-untyped]

MEMORY_BYTES = 4 * 1024**3
"""Most memory that the process may ask for."""
CPU_S = 600
"""Most processor time of one file, seconds: some fifty thousand pages of text."""

_DIVIDED_WORD = ("\ufffe", "\x02")
"""What PDFium puts in place of a hyphen at the end of a line, and of the line's end."""


def read_pdf(path: str, max_pages: int, max_chars: int) -> dict[str, Any]:
    """The text of a file, page after page, each beginning on a new line; or why there is none."""
    try:
        with open(path, "rb") as file:
            document = pypdfium2.PdfDocument(file)
            pages = len(document)
            if pages > max_pages:
                return {"error": f"it has {pages:,} pages; at most {max_pages:,}"}
            texts: list[str] = []
            for number in range(pages):
                page = document[number].get_textpage()
                max_chars -= page.count_chars()
                if max_chars < 0:
                    return {"error": f"page {number + 1} goes beyond the length that a document may have"}
                texts.append(_lines(page.get_text_range()))
            meta = document.get_metadata_dict()
    except pypdfium2.PdfiumError as error:
        if error.err_code == pypdfium2.raw.FPDF_ERR_PASSWORD:
            return {"error": "it is encrypted, and opens with a password alone; save it without one"}
        return {"error": f"it is damaged, or no PDF: {error}"}
    return {
        "text": "\n".join(text for text in texts if text),
        "pages": pages,
        "pages_without_text": sum(not text for text in texts),
        "title": " ".join(meta.get("Title", "").split()),
        "author": " ".join(meta.get("Author", "").split()),
    }


def _lines(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for mark in _DIVIDED_WORD:
        text = text.replace(mark, "-\n")
    return text.strip()


def _answer(value: dict[str, Any]) -> None:
    data = json.dumps(value).encode()
    sys.stdout.buffer.write(len(data).to_bytes(8, "little") + data)
    sys.stdout.buffer.flush()


def main() -> None:
    """Answers requests until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _answer({"pdfium": str(pypdfium2.PDFIUM_INFO)})
    for line in sys.stdin.buffer:
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            _answer(read_pdf(**json.loads(line)))
        except OSError as error:
            _answer({"errno": error.errno, "error": error.strerror})
        except MemoryError:
            _answer({"error": f"it takes more than {MEMORY_BYTES:,} bytes of memory to read"})


if __name__ == "__main__":
    main()
