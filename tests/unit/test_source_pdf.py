"""PDF files: the text of real ones, scans, and what the process that reads them is spared for."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
from read_files import FILES, read, read_one, refused

from outgrow.errors import DataError
from outgrow.streaming.sources import pdf


def made(path: Path, content: bytes, *, pages: int = 1) -> Path:
    """A PDF file whose pages all show ``content``."""
    stream = zlib.compress(content)
    kids = b"3 0 R " * pages
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count %d/Kids[%s]>>" % (pages, kids),
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>",
        b"<</Length %d/Filter/FlateDecode>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    data, places = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    tail = b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, len(data))
    path.write_bytes(data + head + table + tail)
    return path


def shown(text: bytes) -> bytes:
    return b"BT /F 12 Tf 10 10 Td (%s) Tj ET" % text


def test_the_text_and_metadata_of_a_file() -> None:
    document = read_one("pdf", FILES / "book.pdf")
    assert document.content == (
        "Утром над рекой стоял туман — густой, как\nмолоко. Лодка шла медленно, и никто не\nгово-\nрил. «Не греби», "
        "— сказал лоцман.\nHe said it twice, in English too: a well-\nknown word."
    )
    assert document.source == "book.pdf"
    assert document.meta == {"title": "Записки о тумане", "authors": ["Анна Серова"], "pages": 2}


def test_a_file_of_another_program() -> None:
    document = read_one("pdf", FILES / "groff.pdf")
    assert document.content == (
        "Notes on fog\nJohn Marsh\nThe fog over the river stood thick as milk. The boat went slowly, and nobody said a word "
        "about it.\n-2-\nSecond page."
    )
    assert document.meta == {"pages": 2}


def test_a_scan_is_empty_and_says_what_to_do() -> None:
    bad = refused("pdf", FILES / "scan.pdf", "none of its 1 pages has text: a scan; make its text by OCR first")
    assert bad.reason == "empty"


def test_pages_without_text_are_counted(tmp_path: Path) -> None:
    data = made(tmp_path / "a.pdf", shown(b"words"), pages=3).read_bytes()
    blank = b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 6 8]>>"
    (tmp_path / "a.pdf").write_bytes(
        data.replace(b"3 0 R 3 0 R 3 0 R", b"3 0 R 6 0 R 3 0 R") + b"6 0 obj\n" + blank + b"\nendobj\n"
    )
    document = read_one("pdf", made_readable(tmp_path / "a.pdf"))
    assert (document.content, document.meta) == ("words\nwords", {"pages": 3, "pages_without_text": 1})


def made_readable(path: Path) -> Path:
    """The file without its table of objects: PDFium then looks for them."""
    data = path.read_bytes()
    before, _, after = data.partition(b"xref\n0 6")
    path.write_bytes(before + after[after.index(b"%%EOF\n") + 6 :] + b"trailer<</Size 7/Root 1 0 R>>\n%%EOF\n")
    return path


def test_encrypted_and_broken_files_are_named(tmp_path: Path) -> None:
    refused("pdf", FILES / "encrypted.pdf", "it is encrypted, and opens with a password alone")
    path = tmp_path / "a.pdf"
    for data in (b"", b"%PDF-1.7\n", (FILES / "book.fb2").read_bytes(), b"%PDF-1.7\n1 0 obj\n" + b"[" * 100_000):
        path.write_bytes(data)
        refused("pdf", path, "it is damaged, or no PDF: ")
    data = (FILES / "book.pdf").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    refused("pdf", path, "it is damaged, or no PDF|has text|has no pages")


def test_pages_and_characters_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pdf, "MAX_PAGES", 9)
    monkeypatch.setattr(pdf, "MAX_DOCUMENT_BYTES", 40)
    assert read_one("pdf", made(tmp_path / "a.pdf", shown(b"four"), pages=9)).content == "\n".join(["four"] * 9)
    refused("pdf", made(tmp_path / "a.pdf", shown(b"four"), pages=10), "it has 10 pages; at most 9")
    refused("pdf", made(tmp_path / "a.pdf", shown(b"fiver"), pages=9), "page 9 goes beyond the length that a document may have")


def test_a_file_that_is_not_there_is_the_machines_fault(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read("pdf", tmp_path / "none.pdf")
    assert caught.value.errno == errno.ENOENT


# --- the process ------------------------------------------------------------------------------------------------------


def running() -> int:
    process = pdf._process._running
    assert process is not None
    return process.pid


def test_a_file_that_kills_the_process_costs_itself_alone() -> None:
    read("pdf", FILES / "book.pdf")
    first = running()
    os.kill(first, signal.SIGKILL)
    refused(
        "pdf", FILES / "book.pdf", "could not read it: it ended with signal SIGKILL; the file is damaged, or takes too much"
    )
    assert read_one("pdf", FILES / "book.pdf").meta["pages"] == 2
    assert running() != first


def test_one_process_reads_many_files() -> None:
    read("pdf", FILES / "book.pdf")
    first = running()
    for name in ("groff.pdf", "book.pdf", "groff.pdf"):
        read("pdf", FILES / name)
    assert running() == first


def test_a_file_that_takes_all_memory_or_time_costs_itself_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits of the process, made small: 150 MB of content from 150 kB, and seconds of text from 100 kB."""
    program = Path(pdf.__file__).with_name("pdf_pages.py").read_text()
    bomb = made(tmp_path / "bomb.pdf", b" " * 150_000_000)
    endless = made(tmp_path / "endless.pdf", shown(b"word " * 6000), pages=1000)
    for path, limit, small, message in (
        (bomb, "MEMORY_BYTES = 4 * 1024**3", "MEMORY_BYTES = 220_000_000", "takes too much memory|takes more than 220,000,000"),
        (endless, "CPU_S = 600", "CPU_S = 0", "it takes too much processor time"),
    ):
        assert limit in program
        (tmp_path / "pdf_pages.py").write_text(program.replace(limit, small))
        process = pdf._Process()
        monkeypatch.setattr(pdf, "_process", process)
        monkeypatch.setattr(pdf, "__file__", str(tmp_path / "pdf.py"))
        try:
            refused("pdf", path, message)
        finally:
            process.close()


def test_a_process_that_does_not_start_is_no_fault_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pdf_pages.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(pdf, "_process", pdf._Process())
    monkeypatch.setattr(pdf, "__file__", str(tmp_path / "pdf.py"))
    with pytest.raises(DataError, match="the process that reads PDF files does not start: it ended with status 3"):
        read("pdf", FILES / "book.pdf")


def test_it_ends_with_the_process_that_it_reads_for() -> None:
    program = (
        "from pathlib import Path; from outgrow.streaming.sources import pdf\n"
        f"list(pdf.PdfReader().read(Path({str(FILES / 'book.pdf')!r}), 'b')); print(pdf._process._running.pid)\n"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert result.stderr == ""
    pid = int(result.stdout)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")
