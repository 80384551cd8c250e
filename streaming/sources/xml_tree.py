"""XML of files that nobody vouches for, as a tree within bounds: no entity is expanded, no DTD or other file is read."""

from __future__ import annotations

import codecs
import html.entities
import re
from collections.abc import Iterator
from typing import cast

from lxml import etree

from outgrow.streaming.sources.document import BadRecordError

MAX_DEPTH = 100
"""Elements within each other, at most."""
MAX_TAGS = 2_000_000
"""Tags and attributes of one file, at most: each takes some 200 bytes of memory as a tree."""

_UNDECLARED_ENTITY = 26
_WRONG_ENCODING = (32, 81)
_LIMIT = 114
_LIMITS = {
    "depth": f"its elements are nested too deeply; at most {MAX_DEPTH} levels",
    "amplification": "its entities expand to far more than the file holds (a bomb)",
    "too long": "one of its texts has more than 10,000,000 characters",
}
_DECLARED = re.compile(rb"\s*<\?xml[^>]{0,200}?encoding\s*=\s*[\"']([A-Za-z0-9._:-]{1,40})[\"']")
_TOKEN = re.compile(rb"<!\[CDATA\[|\]\]>|<!--|-->|&([A-Za-z][A-Za-z0-9]{0,31});")
_OF_XML = (b"amp", b"lt", b"gt", b"quot", b"apos")
_SURE_UTF8_BYTES = 20
"""As many bytes above ASCII that are sound UTF-8 do not come about by chance."""


def parse_xml(data: bytes, member: str = "") -> etree._Element:
    """The root element of an XML file; ``member`` is its name where it lies within another file.

    Raises ``BadRecordError`` with the line for what is not well-formed, not in the encoding that it declares, or too large.
    """
    name = f"{member}: " if member else ""
    if data.count(b"<") + data.count(b"=") > MAX_TAGS:
        raise BadRecordError(f"{name}it has more than {MAX_TAGS:,} tags and attributes")
    _check_declared_encoding(data, name)
    try:
        return _parsed(data, name)
    except etree.XMLSyntaxError as error:
        raise _bad(error, name, bool(member)) from None


def local_name(element: etree._Element) -> str:
    """The name of an element without its namespace; empty for comments and other nodes that are no elements."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def text_within(element: etree._Element) -> str:
    """All text within an element, without comments."""
    return "".join(cast("Iterator[str]", element.itertext()))


def words_within(element: etree._Element) -> str:
    """All text within an element, its white space one space each."""
    return " ".join(text_within(element).split())


def _parsed(data: bytes, name: str) -> etree._Element:
    """The tree of ``data`` without a node ``&name;`` left in it: those of HTML are characters, any other is refused."""
    try:
        root = _parse(data)
        if next(root.iter(etree.Entity), None) is None:
            return root
    except etree.XMLSyntaxError as error:
        if _code(error) != _UNDECLARED_ENTITY:
            raise
    root = _parse(_with_html_entities(data))
    for node in root.iter(etree.Entity):
        raise BadRecordError(f"{name}the entity {node.text} is not expanded; write out what it stands for")
    return root


def _parse(data: bytes) -> etree._Element:
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_pis=True)
    return etree.fromstring(data, parser)


def _bad(error: etree.XMLSyntaxError, name: str, within: bool) -> BadRecordError:
    line = 0 if within else error.lineno or 0  # a line of a file within another would be looked for in the wrong one
    at = f" (line {error.lineno} of it)" if within and error.lineno else ""
    reason = (error.msg or "").split(", line ")[0].split("\n")[0]
    if _code(error) == _LIMIT:
        known = [words for key, words in _LIMITS.items() if key in reason]
        return BadRecordError(f"{name}{known[0] if known else reason}{at}", line=line)
    if _code(error) in _WRONG_ENCODING:
        return BadRecordError(
            f"{name}it is not in the encoding that it declares: {reason}{at}", reason="undecodable", line=line
        )
    return BadRecordError(f"{name}not well-formed XML: {reason}{at}", line=line)


def _code(error: etree.XMLSyntaxError) -> int:
    """The number that libxml2 gives to what went wrong."""
    code: int = error.code  # type: ignore[attr-defined]  # the stubs lack it
    return code


def _check_declared_encoding(data: bytes, name: str) -> None:
    """Raises ``BadRecordError`` where UTF-8 text says that it is something else: it would be read as nonsense."""
    declared = _DECLARED.match(data[:400])
    if declared is None or data.startswith(codecs.BOM_UTF8):
        return
    encoding = declared[1].decode().lower()
    if encoding in ("utf-8", "utf8") or encoding.startswith(("utf-16", "utf-32", "ucs")):
        return
    if sum(byte >= 0x80 for byte in data[:100_000]) < _SURE_UTF8_BYTES:
        return
    try:
        codecs.getincrementaldecoder("utf-8")().decode(data)
    except UnicodeDecodeError:
        return
    raise BadRecordError(
        f"{name}it declares {encoding}, but is UTF-8; correct its first line", reason="undecodable", line=0 if name else 1
    )


def _with_html_entities(data: bytes) -> bytes:
    """``data`` with HTML's named entities, which XML knows only by a DTD, as numbers; comments and CDATA stay as they are."""
    parts: list[bytes] = []
    done, until = 0, b""
    for token in _TOKEN.finditer(data):
        mark, entity = token[0], token[1]
        if until:
            until = b"" if mark == until else until
        elif mark in (b"<![CDATA[", b"<!--"):
            until = b"]]>" if mark == b"<![CDATA[" else b"-->"
        elif entity and entity not in _OF_XML and (text := html.entities.html5.get(f"{entity.decode()};")):
            parts += [data[done : token.start()], *(b"&#%d;" % ord(letter) for letter in text)]
            done = token.end()
    return b"".join([*parts, data[done:]])
