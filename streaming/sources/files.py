"""Which files a source reads: glob patterns below a folder, in one fixed order, each with the digest of its bytes."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from outgrow.errors import DataError
from outgrow.recipes.schema.data import OnError
from outgrow.streaming.sources.digests import DigestCache, Stamp
from outgrow.streaming.sources.document import Input, Skipped
from outgrow.streaming.sources.documents import DocumentsUnit, units_of


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A regular file as it was found: ``name`` relative to the root with ``/``, ``stamp`` tells later whether it changed."""

    name: str
    path: Path
    stamp: Stamp


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files that match, sorted by name, and the names of links that match and lead nowhere."""

    files: tuple[InputFile, ...]
    dangling: tuple[str, ...] = ()


class InputFiles:
    """The files of one source below ``root`` (a folder, or a single file) that match ``include`` and not ``exclude``."""

    def __init__(self, stream: str, found: Found, digests: DigestCache, text_bytes: Callable[[Path], int]) -> None:
        self.stream = stream
        self.files = found.files
        self._dangling = found.dangling
        self._digests = digests
        self._text_bytes = text_bytes

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """Each file with its digest; files that are unchanged since an earlier call are not read again."""
        measured = self._digests.measure([(file.path, file.stamp) for file in self.files], self._text_bytes)
        return tuple(
            Input(name=file.name, digest=m.digest, num_bytes=file.stamp.size, text_bytes=m.text_bytes)
            for file, m in zip(self.files, measured, strict=True)
        )

    def skipped_units(self) -> Iterator[DocumentsUnit]:
        """Units without a document that count the links that lead nowhere."""
        return units_of(Skipped(source=name, reason="missing") for name in self._dangling)

    def check_unchanged(self) -> None:
        """Raises ``DataError`` naming the first file that was changed or removed since it was listed."""
        for file in self.files:
            if not file.path.exists() or Stamp.of(file.path) != file.stamp:
                raise DataError(
                    "the file changed while the dataset was being built",
                    where=str(file.path),
                    hint="build again when it is at rest",
                )


def find_files(stream: str, root: str, include: Sequence[str], exclude: Sequence[str], *, on_error: OnError = "stop") -> Found:
    """The matching regular files below ``root``; linked folders are followed.

    A ``root`` that is itself a file is taken as it is. Raises ``DataError`` where nothing is there or nothing matches, and
    unless ``on_error`` is ``skip`` for a link that matches and leads nowhere.
    """
    if "://" in root:
        raise DataError(
            f"stream '{stream}': sources are read from a folder of this machine, not from {root}",
            hint="copy it to a folder and name that under sources: in site.yaml",
        )
    path = Path(root).expanduser()
    if path.is_file():
        return Found(files=(InputFile(name=_printable(path.name), path=path, stamp=Stamp.of(path)),))
    if not path.is_dir():
        raise DataError(
            f"stream '{stream}': there is no file or folder {path}", hint="give its place under sources: in site.yaml"
        )
    wanted, unwanted = [_glob(p) for p in include], [_glob(p) for p in exclude]
    names = [
        name
        for name in _walk(path, "", frozenset())
        if any(p.fullmatch(name) for p in wanted) and not any(p.fullmatch(name) for p in unwanted)
    ]
    dangling = sorted({name for name in names if not os.path.exists(path / name)}, key=os.fsencode)
    if dangling and on_error == "stop":
        raise DataError(
            f"stream '{stream}': the link leads to no file that can be read",
            where=str(path / dangling[0]),
            hint="mend or exclude it",
        )
    files = [
        InputFile(name=_printable(name), path=path / name, stamp=Stamp.of(path / name))
        for name in set(names).difference(dangling)
    ]
    if not files:
        raise DataError(
            f"stream '{stream}': no file in {path} matches {', '.join(include)}"
            + (f" less {', '.join(exclude)}" if exclude else ""),
            hint=f"set data.streams[{stream}].source.include to patterns of the files that are there",
        )
    return Found(
        files=tuple(sorted(files, key=lambda file: os.fsencode(file.name))),
        dangling=tuple(_printable(name) for name in dangling),
    )


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Names of all regular files and dangling links below ``folder``.

    ``above`` are the folders being walked, so that a link to one ends there.
    """
    status = folder.stat()
    key = (status.st_dev, status.st_ino)
    if key in above:
        return
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        raise DataError("the folder cannot be read", where=str(folder), hint="give yourself the right, or exclude it") from None
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            yield prefix + entry.name
        elif entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {key})
        elif entry.is_file() and stat.S_ISREG(entry.stat().st_mode):
            yield prefix + entry.name


def _glob(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression over ``/`` paths: ``**/`` any folders or none, ``*`` and ``?`` within one name."""
    parts: list[str] = []
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", pattern, flags=re.DOTALL):
        if len(token) > 1 and token.startswith("["):
            body = re.sub(r"[\[\\&~|]", r"\\\g<0>", token[1:-1])
            parts.append(f"[^{body[1:]}]" if body.startswith("!") else f"[{body}]")
        else:
            parts.append({"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}.get(token) or re.escape(token))
    try:
        return re.compile("".join(parts), flags=re.DOTALL)
    except re.error as error:
        raise DataError(f"'{pattern}' is not a glob pattern: {error}") from None


def _printable(name: str) -> str:
    """``name`` as text that any encoding takes; bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(name).decode("utf-8", errors="replace")
