"""Looks at files by the reader of their kind, for kinds whose files are read whole."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

from outgrow.streaming.detection.files import IN_DOUBT, MAX_RECORDS, SAMPLE_CHARS, WHOLE_BYTES, Look, source_of
from outgrow.streaming.sources import BadRecordError, Document, file_reader

_RUSSIAN_ENCODINGS = ("cp1251", "koi8-r", "cp866", "iso8859-5")
_FREQUENT = "оеаинтсрвл"
_FREQUENT_SHARE = 0.5


def likely_russian(data: bytes) -> str:
    """The old Russian encoding in which bytes look most like Russian, empty where they do in none.

    More than half of the letters of a Russian text are among its ten most frequent ones.
    """
    high = sum(byte >= 0x80 for byte in data[:SAMPLE_CHARS])
    shares = {}
    for encoding in _RUSSIAN_ENCODINGS:
        text = data[:SAMPLE_CHARS].decode(encoding, errors="replace")
        shares[encoding] = sum(map(text.count, _FREQUENT)) / max(high, 1)
    best = max(shares, key=lambda encoding: shares[encoding])
    return best if shares[best] > _FREQUENT_SHARE else ""


def whole_look(path: Path, name: str, kind: str) -> Look:
    """What the reader of the kind makes of the file. Raises ``BadRecordError`` where it cannot be read at all."""
    if path.stat().st_size > WHOLE_BYTES:
        return Look(name=name, kind=kind)
    facts: Counter[str] = Counter()
    misfits: list[str] = []
    text, encoding = "", "utf-8"
    num_fit = 0
    try:
        for item in islice(file_reader(source_of(kind)).read(path, name), MAX_RECORDS):
            if isinstance(item, Document):
                num_fit += 1
                text += str(item.content)[:SAMPLE_CHARS]
                encoding = str(item.meta.get("encoding", encoding))
                facts["speakers"] += len({speaker for _, _, speaker in item.meta.get("cues", ()) if speaker})
                facts["pages without text"] += item.meta.get("pages_without_text", 0)
            else:
                misfits.append(f"{item.source or name}: {item}")
    except BadRecordError as bad:
        if bad.reason == "empty":
            return Look(name=name, kind=kind, problem=str(bad), facts=Counter({"scans": int(kind == "pdf")}))
        if bad.reason == "undecodable" and kind == "transcript":
            likely = likely_russian(path.read_bytes())
            return Look(name=name, kind=kind, problem=str(bad), encoding=IN_DOUBT, likely_encoding=likely)
        raise
    return Look(
        name=name,
        kind=kind,
        num_records=num_fit + len(misfits),
        num_fit=num_fit,
        num_misfits=len(misfits),
        misfit=next(iter(misfits), ""),
        encoding=encoding,
        text=text[:SAMPLE_CHARS],
        facts=facts,
    )
