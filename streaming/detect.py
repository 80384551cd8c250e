"""What lies in a file or folder, and the section of a recipe that would read it: detection proposes, the recipe decides."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from outgrow.errors import DataError
from outgrow.streaming.detection.files import WHOLE_BYTES, Look, kind_by_name, suffix_of
from outgrow.streaming.detection.looks import look
from outgrow.streaming.detection.proposals import Proposal, Setting, counted, propose, slug
from outgrow.streaming.sources.document import BadRecordError
from outgrow.streaming.sources.files import InputFile, files_below
from outgrow.streaming.sources.json_text import parse

MAX_LOOKS = 400
"""Files that are looked at, at most."""
MAX_LOOKS_A_SUFFIX = 60
_LISTED = 30
"""Files that are not understood are named up to so many."""
_WHY_CHARS = 240
_WHY_COLUMN = 44
_LINE_CHARS = 128
_TOKEN_COLUMNS = ("tokens", "input_ids")


@dataclass(frozen=True, kw_only=True)
class Detection:
    """What was found at ``path``: ``num_files`` files of ``num_bytes``, of which ``num_looks`` were looked at.

    ``places`` are the names that the streams call folders by, and what they stand for on this machine; ``unknown`` are files
    that no stream reads, with why.
    """

    path: Path
    num_files: int
    num_bytes: int
    num_looks: int
    places: tuple[tuple[str, Path], ...]
    streams: tuple[Proposal, ...]
    unknown: tuple[tuple[str, str], ...]


def detect(path: Path) -> Detection:
    """The streams that would read the file or folder. Raises ``DataError`` where nothing is there, or it may not be read."""
    if not path.exists():
        raise DataError("there is no such file or folder", where=str(path), hint="give the folder that holds your files")
    found = files_below(path)
    files = found.files
    if not files and not found.dangling:
        raise DataError("the folder holds no file", where=str(path), hint="give the folder that holds your files")
    place = slug(path.resolve().stem if path.is_file() else path.resolve().name) or "data"
    shards = dict(_token_shards(files))
    plain = [file for file in files if not any(file.name.startswith(folder) for folder in shards)]
    chosen = _sample(plain)
    looks = [_look(file) for file in chosen]
    streams = propose(looks, [file.name for file in files], _stand_ins(plain, chosen), place)
    places = [(place, path.resolve())] if streams else []
    for folder, column in shards.items():
        name = _free(slug(folder.rstrip("/").rpartition("/")[2]) or place, [name for name, _ in places])
        places.append((name, path.resolve() / folder))
        streams.append(_of_shards(name, column))
    return Detection(
        path=path,
        num_files=len(files),
        num_bytes=sum(file.stamp.size for file in files),
        num_looks=len(chosen),
        places=tuple(places),
        streams=tuple(streams),
        unknown=(*_unknown(looks, streams), *((name, "a link that leads to no file") for name, _ in found.dangling)),
    )


def render(detection: Detection) -> str:
    """YAML of the section ``streams``, with why in comments; it ends with a line end."""
    size = f"{detection.num_bytes / 1e6:,.1f} MB"
    looked = "" if detection.num_looks == detection.num_files else f"; {detection.num_looks:,} of them looked at"
    lines = [_comment(f"{counted(detection.num_files, 'file')} in {detection.path}, {size}{looked}.")]
    if detection.streams:
        lines.append("# This belongs under data: in the recipe; read it, and change what is wrong. In site.yaml:")
        lines.append("#   sources:")
        lines += [_comment(f"    {name}: {_flow(str(place))}") for name, place in detection.places]
        lines.append("streams:")
        for stream in detection.streams:
            lines += _stream_lines(stream)
    else:
        lines.append("streams: []  # nothing here is of a kind that is read")
    if detection.unknown:
        lines.append(f"# Not understood, and read by no stream: {counted(len(detection.unknown), 'file')}")
        lines += [_comment(f"  {name}: {why}") for name, why in detection.unknown[:_LISTED]]
        if len(detection.unknown) > _LISTED:
            lines.append(f"#   and {len(detection.unknown) - _LISTED:,} more")
    return "\n".join(lines) + "\n"


# --- which files are looked at ----------------------------------------------------------------------------------------


def _sample(files: Sequence[InputFile]) -> list[InputFile]:
    """Files spread evenly over those of each suffix, in order."""
    by_suffix: dict[str, list[InputFile]] = defaultdict(list)
    for file in files:
        by_suffix[suffix_of(file.name).lower()].append(file)
    known = sorted(by_suffix.values(), key=lambda group: not kind_by_name(group[0].name))
    share = max(1, min(MAX_LOOKS_A_SUFFIX, MAX_LOOKS // max(len(known), 1)))
    chosen = {file.name for group in known[:MAX_LOOKS] for file in group[:: -(-len(group) // share)]}
    return [file for file in files if file.name in chosen]


def _stand_ins(files: Sequence[InputFile], chosen: Sequence[InputFile]) -> dict[str, str]:
    """For each file that is not looked at, one that is: of the same suffix, before it in the same folder, or else any."""
    looked = {file.name for file in chosen}
    nearest: dict[tuple[str, str], str] = {}
    anywhere: dict[str, str] = {}
    for file in chosen:
        anywhere.setdefault(suffix_of(file.name).lower(), file.name)
    found: dict[str, str] = {}
    for file in files:
        suffix, folder = suffix_of(file.name).lower(), file.name.rpartition("/")[0]
        if file.name in looked:
            nearest[folder, suffix] = file.name
        elif suffix in anywhere:
            found[file.name] = nearest.get((folder, suffix), anywhere[suffix])
    return found


def _look(file: InputFile) -> Look:
    try:
        return look(file.path, file.name)
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror or error}", where=str(file.path)) from error


def _unknown(looks: Sequence[Look], streams: Sequence[Proposal]) -> Iterator[tuple[str, str]]:
    kinds = {setting.value for stream in streams for setting in stream.settings if setting.key == "source.kind"}
    for seen in looks:
        if not seen.kind or seen.kind not in kinds:
            yield seen.name, seen.problem


# --- token shards -----------------------------------------------------------------------------------------------------


def _token_shards(files: Sequence[InputFile]) -> Iterator[tuple[str, str]]:
    """Folders of MDS shards that hold token ids, each with the column of them."""
    for file in files:
        folder, _, name = file.name.rpartition("/")
        if name != "index.json" or file.stamp.size > WHOLE_BYTES:
            continue
        try:
            index = parse(file.path.read_text(encoding="utf-8", errors="replace"))
        except BadRecordError:
            continue
        shards = index.get("shards") if isinstance(index, dict) else None
        first = shards[0] if isinstance(shards, list) and shards and isinstance(shards[0], dict) else {}
        columns = first.get("column_names")
        if first.get("format") == "mds" and isinstance(columns, list):
            column = next((column for column in _TOKEN_COLUMNS if column in columns), "")
            if column:
                yield f"{folder}/" if folder else "", column


def _of_shards(name: str, column: str) -> Proposal:
    settings = [
        Setting(key="name", value=name),
        Setting(key="source.kind", value="mds", why=f"index.json names shards with a column '{column}'"),
        Setting(key="source.path", value=name),
    ]
    if column != "tokens":
        settings.append(Setting(key="source.column", value=column))
    note = "token ids: the recipe's tokenizer must be the one that made them"
    return Proposal(settings=tuple(settings), notes=(note,))


def _free(name: str, taken: Sequence[str]) -> str:
    return name if name not in taken else next(n for n in (f"{name}-{i}" for i in range(2, 10_000)) if n not in taken)


# --- YAML -------------------------------------------------------------------------------------------------------------


def _stream_lines(stream: Proposal) -> Iterator[str]:
    begins = "  - "
    within = ""
    for setting in stream.settings:
        section, _, key = setting.key.rpartition(".")
        if section and section != within:
            yield f"{begins}{section}:"
            begins = "    "
        within = section
        text = f"{begins}{'  ' if section else ''}{key}: {_flow(setting.value)}"
        beside = f"{text:<{_WHY_COLUMN}} {_comment(setting.why)}"
        if setting.why and len(beside) > _LINE_CHARS:
            yield f"{' ' * (len(text) - len(text.lstrip(' -')))}{_comment(setting.why)}"
        yield beside if setting.why and len(beside) <= _LINE_CHARS else text
        begins = "    "
    yield from (f"    {_comment(note)}" for note in stream.notes)


def _flow(value: Any) -> str:
    """A value on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(text: str) -> str:
    """A comment on one line, whatever a file name or an error holds."""
    words = "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    return f"# {words[:_WHY_CHARS]}{'…' if len(words) > _WHY_CHARS else ''}"
