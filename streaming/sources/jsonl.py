"""Source ``jsonl``: JSON lines, plain or compressed; each line is one record."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from outgrow.recipes.schema.sources import JsonlSource, Shape
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import BadRecordError, Document
from outgrow.streaming.sources.files import InputFile
from outgrow.streaming.sources.json_records import read_record, too_long
from outgrow.streaming.sources.lines import LineBlock, line_blocks, text_bytes
from outgrow.streaming.sources.reading import BadPiece, Files, Piece, open_files


@dataclass(frozen=True, kw_only=True)
class LinesPiece:
    """A block of lines of the file ``name``."""

    name: str
    block: LineBlock
    shape: Shape

    @property
    def path(self) -> Path:
        return self.block.path

    @property
    def num_bytes(self) -> int:
        return self.block.num_bytes

    def read(self) -> Iterator[Document | BadRecordError]:
        for number, line in self.block.lines():
            source = f"{self.name}#{number}"
            if self.block.too_long:
                yield too_long(self.num_bytes, line, source, number)
            elif not line.strip():
                yield BadRecordError("the line is empty", reason="empty", line=number)
            else:
                yield read_record(line.rstrip(b"\r\n"), self.shape, source, number)


def open_jsonl(stream: str, source: JsonlSource, root: str, digests: DigestCache) -> Files:
    """The source at ``root``. Raises ``DataError`` where no file matches.

    Of a compressed file that is damaged nothing is used: what comes before the damage was found may be wrong as well.
    """

    @cache
    def damage(path: Path) -> BadRecordError | None:
        try:
            text_bytes(path)
        except BadRecordError as error:
            return error
        return None

    def cut(file: InputFile) -> Iterator[Piece]:
        if source.on_error != "stop" and (error := damage(file.path)):
            yield BadPiece(name=file.name, path=file.path, num_bytes=file.stamp.size, error=error)
            return
        try:
            for block in line_blocks(file.path):
                yield LinesPiece(name=file.name, block=block, shape=source.shape)
        except BadRecordError as error:
            yield BadPiece(name=file.name, path=file.path, num_bytes=0, error=error)

    return open_files(stream, source, root, digests, cut=cut, text_bytes=text_bytes)
