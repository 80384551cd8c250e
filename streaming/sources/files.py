"""Which files a source reads: those below a folder that glob patterns choose, in one fixed order."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from outgrow.errors import DataError
from outgrow.streaming.sources.digests import Stamp


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A regular file as it was found: ``name`` relative to the root with ``/``, ``stamp`` tells later whether it changed."""

    name: str
    path: Path
    stamp: Stamp


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files that match, sorted by name, and name and path of links that match and lead nowhere."""

    files: tuple[InputFile, ...]
    dangling: tuple[tuple[str, Path], ...] = ()


def find_files(stream: str, root: str, include: Sequence[str], exclude: Sequence[str]) -> Found:
    """The regular files below ``root`` (a folder, or a single file) that match ``include`` and not ``exclude``.

    Linked folders are followed; a ``root`` that is itself a file is taken as it is. Raises ``DataError`` where nothing is there
    or nothing matches.
    """
    if "://" in root:
        raise DataError(
            f"stream '{stream}': sources are read from a folder of this machine, not from {root}",
            hint="copy it to a folder and name that under sources: in site.yaml",
        )
    path = Path(root).expanduser()
    if not path.is_file() and not path.is_dir():
        raise DataError(
            f"stream '{stream}': there is no file or folder {path}", hint="give its place under sources: in site.yaml"
        )
    found = files_below(path, include, exclude)
    if not found.files and not found.dangling:
        raise DataError(
            f"stream '{stream}': no file in {path} matches {', '.join(include)}"
            + (f" less {', '.join(exclude)}" if exclude else ""),
            hint=f"set data.streams[{stream}].source.include to patterns of the files that are there",
        )
    return found


def files_below(path: Path, include: Sequence[str] = ("**/*",), exclude: Sequence[str] = ()) -> Found:
    """As ``find_files``, of a file or folder that is there; perhaps nothing."""
    if path.is_file():
        return Found(files=(InputFile(name=_printable(path.name), path=path, stamp=Stamp.of(path)),))
    wanted, unwanted = [_glob(p) for p in include], [_glob(p) for p in exclude]
    names = [
        name
        for name in _walk(path, "", frozenset(), unwanted)
        if any(p.fullmatch(name) for p in wanted) and not any(p.fullmatch(name) for p in unwanted)
    ]
    dangling = sorted({name for name in names if not os.path.exists(path / name)}, key=os.fsencode)
    files = [
        InputFile(name=_printable(name), path=path / name, stamp=Stamp.of(path / name))
        for name in set(names).difference(dangling)
    ]
    return Found(
        files=tuple(sorted(files, key=lambda file: os.fsencode(file.name))),
        dangling=tuple((_printable(name), path / name) for name in dangling),
    )


def _walk(folder: Path, prefix: str, above: frozenset[tuple[int, int]], unwanted: Sequence[re.Pattern[str]]) -> Iterator[str]:
    """Names of all regular files and dangling links below ``folder``.

    ``above`` are the folders being walked, so that a link to one ends there. Raises ``DataError`` for a folder that may not be
    read, unless ``unwanted`` leaves out all that may be in it.
    """
    status = folder.stat()
    key = (status.st_dev, status.st_ino)
    if key in above:
        return
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        if any(pattern.fullmatch(f"{prefix}any/file") for pattern in unwanted):
            return
        hint = "give yourself the right" + (f", or set the source's exclude to ['{prefix}**']" if prefix else "")
        raise DataError("the folder cannot be read", where=str(folder), hint=hint) from None
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry.path):
            yield prefix + entry.name
        elif entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", above | {key}, unwanted)
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
