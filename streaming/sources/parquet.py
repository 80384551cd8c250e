"""Source ``parquet``: each row is one record, its columns the keys; nested columns are objects and lists.

Groups of rows are read in small batches, by themselves, so that a large file is divided among processes. Times are text as ISO
8601 has them, decimals are text, and what is not a number is null. Binary columns (pictures, sound) are not read, unless the
shape names one: then it holds UTF-8.
"""

from __future__ import annotations

import datetime
import decimal
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from outgrow.recipes.schema.sources import ParquetSource, Shape
from outgrow.streaming.sources.digests import DigestCache
from outgrow.streaming.sources.document import UNIT_BYTES, BadRecordError, Document
from outgrow.streaming.sources.files import InputFile
from outgrow.streaming.sources.reading import Files, Piece, open_files
from outgrow.streaming.sources.shapes import document, needed_keys

_BATCH_BYTES = 4 * 1024 * 1024
"""Values that are decoded at once."""
_BATCH_ROWS = 1024
_EXPANDED_BYTES = 1024 * 1024 * 1024
"""At most this much may come of a batch whose every row repeats the longest value of a dictionary."""
_PIECE_BYTES = 64 * 1024 * 1024
_PIECES_A_GROUP = 16
"""A group of rows is divided in at most so many pieces: each has to decode the rows of the group that come before its own."""
_UNREADABLE = (pa.ArrowException, OSError, ValueError, KeyError, NotImplementedError, OverflowError)
"""What Arrow raises for bytes that are no sound Parquet."""


@dataclass(frozen=True, kw_only=True)
class RowsPiece:
    """Rows ``skip`` to ``skip + num_rows`` of ``groups``, which begin at row ``first_row`` of the file ``name``."""

    name: str
    path: Path
    num_bytes: int
    groups: tuple[int, ...]
    first_row: int
    skip: int
    num_rows: int
    shape: Shape

    def read(self) -> Iterator[Document | BadRecordError]:
        with _opened(self.path) as file:
            position = 0
            for batch in _batches(file, self.groups, needed_keys(self.shape)):
                start, stop = max(self.skip - position, 0), min(self.skip + self.num_rows - position, len(batch))
                if start < stop:
                    yield from self._records(batch.slice(start, stop - start), self.first_row + position + start)
                position += len(batch)
                if position >= self.skip + self.num_rows:
                    return

    def _records(self, batch: pa.RecordBatch, first: int) -> Iterator[Document | BadRecordError]:
        for number, record in enumerate(_rows(batch), first):
            source = f"{self.name}#{number}"
            try:
                if isinstance(record, Exception):
                    raise BadRecordError(f"it cannot be read: {record}")
                yield document(self.shape, _record(record, needed_keys(self.shape)), source)
            except BadRecordError as bad:
                content = "" if isinstance(record, Exception) else json.dumps(record, ensure_ascii=False, default=repr)
                yield BadRecordError(f"row {number:,}: {bad}", reason=bad.reason, source=source, content=content)


def open_parquet(stream: str, source: ParquetSource, root: str, digests: DigestCache) -> Files:
    """The source at ``root``. Raises ``DataError`` where no file matches; a file that is no Parquet, or lacks a column that the
    shape needs, is unfit."""
    return open_files(
        stream,
        source,
        root,
        digests,
        cut=partial(_cut, source.shape),
        check=partial(_check, source.shape),
        text_bytes=_text_bytes,
    )


def first_records(path: Path, count: int) -> tuple[list[str], list[dict[str, Any] | BadRecordError]]:
    """The columns that are not binary, and as many of the first rows as plain JSON values, or why one cannot be read.

    Raises ``BadRecordError`` where the file is no Parquet.
    """
    with _opened(path) as file:
        names = [field.name for field in file.schema_arrow if not _is_binary(field.type)]
        groups = tuple(range(file.metadata.num_row_groups))
        rows = islice((row for batch in _batches(file, groups, ()) for row in _rows(batch)), count)
        return names, [BadRecordError(str(row)) if isinstance(row, Exception) else _record(row, ()) for row in rows]


# --- files ------------------------------------------------------------------------------------------------------------


def _opened(path: Path) -> pq.ParquetFile:
    """The file with its table of contents read. Raises ``BadRecordError`` where it is no Parquet."""
    with open(path, "rb"):  # what the machine refuses is told from what Arrow does
        pass
    try:
        return pq.ParquetFile(path, pre_buffer=False, buffer_size=1024 * 1024, page_checksum_verification=True)
    except _UNREADABLE as error:
        raise _damaged(error) from None


def _damaged(error: Exception) -> BadRecordError:
    return BadRecordError(
        f"it is no Parquet that can be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    )


def _check(shape: Shape, file: InputFile) -> BadRecordError | None:
    try:
        with _opened(file.path) as opened:
            names = opened.schema_arrow.names
    except BadRecordError as bad:
        return bad
    shown = ", ".join(names) or "none"
    for key in needed_keys(shape):
        if key not in names:
            return BadRecordError(f"there is no column '{key}', which shape: {{kind: {shape.kind}}} needs; columns: {shown}")
    twice = next((name for name in names if names.count(name) > 1), None)
    return None if twice is None else BadRecordError(f"two columns are called '{twice}'; columns: {shown}")


def _text_bytes(path: Path) -> int:
    """Size of the values of all columns before compression."""
    with _opened(path) as file:
        return sum(file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups))


def _cut(shape: Shape, file: InputFile) -> Iterator[Piece]:
    """Pieces of at least ``UNIT_BYTES`` where groups of rows are small, and parts of groups where they are large."""
    with _opened(file.path) as opened:
        sizes = [
            (opened.metadata.row_group(group).num_rows, opened.metadata.row_group(group).total_byte_size)
            for group in range(opened.metadata.num_row_groups)
        ]
    start, first_row, num_rows, num_bytes = 0, 1, 0, 0
    for group, (rows, size) in enumerate(sizes, 1):
        num_rows, num_bytes = num_rows + rows, num_bytes + size
        if num_bytes < UNIT_BYTES and group < len(sizes):
            continue
        parts = min(max(num_bytes // _PIECE_BYTES, 1), _PIECES_A_GROUP, max(num_rows, 1))
        for part in range(parts):
            skip, stop = num_rows * part // parts, num_rows * (part + 1) // parts
            yield RowsPiece(
                name=file.name,
                path=file.path,
                num_bytes=num_bytes * (part + 1) // parts - num_bytes * part // parts,
                groups=tuple(range(start, group)),
                first_row=first_row,
                skip=skip,
                num_rows=stop - skip,
                shape=shape,
            )
        start, first_row, num_rows, num_bytes = group, first_row + num_rows, 0, 0


# --- rows -------------------------------------------------------------------------------------------------------------


def _batches(file: pq.ParquetFile, groups: tuple[int, ...], named: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """The rows of some groups in batches of bounded memory. Raises ``BadRecordError`` where they cannot be read further."""
    columns = _columns(file.schema_arrow, named)
    batches = file.iter_batches(_batch_rows(file.metadata, groups), row_groups=list(groups), columns=columns, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except _UNREADABLE as error:
            raise _damaged(error) from None
        if batch is None:
            return
        yield batch


def _batch_rows(metadata: pq.FileMetaData, groups: tuple[int, ...]) -> int:
    """Rows that are decoded at once."""
    rows = _BATCH_ROWS
    for group in (metadata.row_group(number) for number in groups):
        rows = min(rows, _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1))
        for column in (group.column(number) for number in range(group.num_columns)):
            if column.has_dictionary_page:  # a few bytes a row may stand for a long value
                rows = min(rows, _EXPANDED_BYTES // max(column.total_uncompressed_size, 1))
    return max(rows, 1)


def _columns(schema: pa.Schema, named: tuple[str, ...]) -> list[str]:
    """The columns to read, of a struct its fields: those that are not binary, and those that the shape names."""
    columns: list[str] = []
    for field in schema:
        if field.name in named or not (_is_binary(field.type) or pa.types.is_struct(field.type)):
            columns.append(field.name)
        elif pa.types.is_struct(field.type):
            columns += [f"{field.name}.{child.name}" for child in field.type if not _is_binary(child.type)]
    return columns


def _is_binary(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(test(kind) for test in tests)


def _rows(batch: pa.RecordBatch) -> Iterator[dict[str, Any] | Exception]:
    """The rows as Python values, and what Arrow says of one that it cannot turn into them."""
    batch = pa.RecordBatch.from_arrays([_in_microseconds(column) for column in batch.columns], names=batch.schema.names)
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
        return
    except _UNREADABLE:
        pass
    for number in range(len(batch)):
        try:
            (row,) = batch.slice(number, 1).to_pylist(maps_as_pydicts="strict")
        except _UNREADABLE as error:
            yield error
        else:
            yield row


def _in_microseconds(column: pa.Array) -> pa.Array:
    """Times of a column to the microsecond: Python has no finer ones. Times within lists and objects stay."""
    kind = column.type
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return column.cast(pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return column.cast(pa.duration("us"), safe=False)
    return column.cast(pa.time64("us"), safe=False) if kind == pa.time64("ns") else column


def _record(row: dict[str, Any], named: tuple[str, ...]) -> dict[str, Any]:
    """The row as plain JSON values."""
    for key in named:
        if isinstance(row.get(key), bytes):
            try:
                row[key] = row[key].decode()
            except UnicodeDecodeError as error:
                raise BadRecordError(f"{key}: byte {error.start} is not UTF-8") from None
    return {key: value if isinstance(value, str) else _plain(value) for key, value in row.items()}


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case None | bool() | int() | str():
            return value
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case datetime.date() | datetime.time():  # a datetime is a date
            return value.isoformat()
        case decimal.Decimal() | datetime.timedelta():
            return str(value)
    return None  # binary
