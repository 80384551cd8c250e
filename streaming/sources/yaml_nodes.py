"""YAML of files that nobody vouches for: its documents with their own text and their nodes, within bounds.

Only PyYAML's parser is used, event by event, so that nothing is constructed and depth is known before it hurts. Tags that would
make objects, keys given twice, aliases that multiply and deep nesting are refused with the line. Plain scalars are read as
recipes are: ``yes``, dates and ``010:30`` are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from outgrow.streaming.sources.document import BadRecordError

MAX_DEPTH = 100
"""Lists and mappings within each other, at most."""
MAX_VALUES = 1_000_000
"""Keys and values of one document, at most, aliases counted as what they stand for where they are written out."""

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset({f"{_TAG}{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "timestamp")})
_SCALARS = {
    f"{_TAG}null": re.compile(r"(?:null|~|)\Z"),
    f"{_TAG}bool": re.compile(r"(?:true|false)\Z"),
    f"{_TAG}int": re.compile(r"[-+]?[0-9][0-9_]{0,30}\Z"),
    f"{_TAG}float": re.compile(r"[-+]?(?:[0-9][0-9_]{0,60}(?:\.[0-9_]{0,60})?|\.[0-9][0-9_]{0,60})(?:[eE][-+]?[0-9]{1,3})?\Z"),
}
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster; a PyYAML built without libyaml lacks it
_BLANK_LINES = re.compile(r"(?:[ \t]*\n)+")


class _Dumper(yaml.SafeDumper):
    """Writes nodes so that what was plain stays plain."""

    yaml_implicit_resolvers = {}


for _tag, _pattern in _SCALARS.items():
    _Dumper.add_implicit_resolver(_tag, _pattern, None)


@dataclass(frozen=True, kw_only=True)
class YamlDocument:
    """One document of a file: ``text`` as it stands there without the marks around it, ``line`` where it begins (from 1).

    ``root`` is a mapping or a list, None where the document is empty.
    """

    text: str
    line: int
    root: yaml.Node | None


def read_documents(text: str) -> Iterator[YamlDocument | BadRecordError]:
    """The documents in order, and what is wrong with a document in its place.

    Raises ``BadRecordError`` with the line where the file cannot be read further.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    builder = _Builder()
    above = ""  # comments of this document before its mark ---
    begin = end = line = 0  # where it begins after the mark, where the one before it ends, and the line of the mark
    event: Any
    try:
        for event in yaml.parse(text, Loader=_Loader):
            start, stop = event.start_mark, event.end_mark
            if isinstance(event, yaml.DocumentStartEvent):
                builder = _Builder()
                above = _above(text, end, stop.index) if event.explicit else ""
                begin = stop.index if event.explicit else end
                line = stop.line + 1 if event.explicit else 1
            elif isinstance(event, yaml.DocumentEndEvent):
                end = stop.index
                below = text[begin : start.index]
                body = "\n".join(filter(None, (above, _trimmed(below.lstrip(" ") if begin else below))))
                yield _document(builder, body, line)
            else:
                builder.add(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadRecordError(f"not valid YAML: {error.problem or error.context}", line=mark.line + 1 if mark else 0) from None
    except yaml.YAMLError as error:
        raise BadRecordError(f"not valid YAML: {str(error).splitlines()[0]}") from None


class Expander:
    """Copies nodes of one document with their aliases written out: up to ``MAX_VALUES`` nodes, all copies together."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def copy(self, node: yaml.Node, depth: int = 0) -> Any:
        """The copy. Raises ``BadRecordError`` where the aliases multiply, or nest too deeply."""
        self._left -= 1
        if self._left < 0:
            message = f"its aliases stand for more than {MAX_VALUES:,} values (a bomb)"
            raise BadRecordError(message, line=line_of(node))
        if depth > MAX_DEPTH:
            raise BadRecordError(f"its aliases nest too deeply; at most {MAX_DEPTH} levels", line=line_of(node))
        if isinstance(node, yaml.MappingNode):
            pairs = [(self.copy(key, depth + 1), self.copy(value, depth + 1)) for key, value in node.value]
            return yaml.MappingNode(node.tag, pairs, node.start_mark, flow_style=node.flow_style)
        if isinstance(node, yaml.SequenceNode):
            items = [self.copy(item, depth + 1) for item in node.value]
            return yaml.SequenceNode(node.tag, items, node.start_mark, flow_style=node.flow_style)
        return _scalar(node.tag, node.value, node)


def rendered(node: yaml.Node) -> str:
    """The YAML of a node without aliases, its scalars as they were written; comments are not part of it."""
    text: str = yaml.serialize(node, Dumper=_Dumper, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def plain(node: yaml.Node) -> Any:
    """A node without aliases as JSON has it."""
    if isinstance(node, yaml.MappingNode):
        return {key.value if isinstance(key, yaml.ScalarNode) else rendered(key): plain(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    text: str = node.value
    if node.tag not in _SCALARS or not _SCALARS[node.tag].match(text):
        return text
    match node.tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return text == "true"
        case "int":
            return int(text.replace("_", ""))
        case _:
            value = float(text.replace("_", ""))
            return value if math.isfinite(value) else text


def is_null(node: yaml.Node) -> bool:
    """Whether a node holds nothing: ``null``, ``~``, or no value at all."""
    return isinstance(node, yaml.ScalarNode) and node.tag == f"{_TAG}null"


def line_of(node: yaml.Node) -> int:
    """The line of the file in which a node begins, from 1."""
    return node.start_mark.line + 1 if node.start_mark else 0


def _above(text: str, start: int, stop: int) -> str:
    """The comments before the mark ``---`` that ends at ``stop``; directives (``%YAML``) are not the document's own."""
    lines = text[start : stop - len("---")].split("\n")
    return _trimmed("\n".join(line for line in lines if not line.startswith("%")))


def _document(builder: _Builder, body: str, line: int) -> YamlDocument | BadRecordError:
    if builder.problem is not None:
        message, at = builder.problem
        return BadRecordError(message, line=at, content=body)
    root = builder.root
    if isinstance(root, yaml.ScalarNode):
        if root.value:
            message = "it holds a single value; allowed: a mapping or a list"
            return BadRecordError(message, line=line_of(root), content=body)
        root = None
    return YamlDocument(text=body, line=line if root is None else line_of(root), root=root)


def _trimmed(text: str) -> str:
    """``text`` without empty lines at its beginning and its end; the first line keeps its indentation."""
    blank = _BLANK_LINES.match(text)
    return (text[blank.end() :] if blank else text).rstrip()


@dataclass
class _Open:
    """A list or mapping whose end has not come; ``key`` waits for its value."""

    node: yaml.CollectionNode
    key: yaml.Node | None = None
    seen: set[str] = field(default_factory=set)


class _Builder:
    """Puts the nodes of one document together; the first thing that is wrong with it is kept in ``problem``."""

    def __init__(self) -> None:
        self.root: yaml.Node | None = None
        self.problem: tuple[str, int] | None = None
        self._open: list[_Open] = []
        self._anchors: dict[str, yaml.Node] = {}
        self._left = MAX_VALUES

    def add(self, event: Any) -> None:
        """Takes the next event. Raises ``BadRecordError`` where going on would cost too much."""
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionEndEvent):
            self._put(self._open.pop().node)
            return
        if not isinstance(event, yaml.NodeEvent):
            return
        self._left -= 1
        if self._left < 0:
            raise BadRecordError(f"a document has more than {MAX_VALUES:,} keys and values", line=line)
        if isinstance(event, yaml.AliasEvent):
            self._put(self._alias(event, line))
            return
        node = self._node(event, line)
        if event.anchor:
            self._anchors[event.anchor] = node
        if not isinstance(node, yaml.CollectionNode):
            self._put(node)
        elif len(self._open) < MAX_DEPTH:
            self._open.append(_Open(node))
        else:
            raise BadRecordError(f"lists and mappings are nested too deeply; at most {MAX_DEPTH} levels", line=line)

    def _node(self, event: Any, line: int) -> yaml.Node:
        """The node that begins with the event, still without what it holds."""
        tag: str | None = event.tag
        if tag and tag != "!" and tag not in _PLAIN_TAGS:
            self._refuse(f"the tag {tag.replace(_TAG, '!!')} is not allowed; write plain values", line)
        if isinstance(event, yaml.ScalarEvent):
            known = tag if tag in _PLAIN_TAGS else _tag_of(event.value) if event.implicit[0] else f"{_TAG}str"
            return _scalar(known, event.value, event)
        kind = yaml.MappingNode if isinstance(event, yaml.MappingStartEvent) else yaml.SequenceNode
        kind_tag = f"{_TAG}{'map' if kind is yaml.MappingNode else 'seq'}"
        return kind(kind_tag, [], event.start_mark, flow_style=event.flow_style)

    def _alias(self, event: Any, line: int) -> yaml.Node:
        node = self._anchors.get(event.anchor)
        if node is None:
            self._refuse(f"the alias *{event.anchor} stands for nothing above it", line)
        elif any(place.node is node for place in self._open):
            self._refuse(f"the alias *{event.anchor} stands for what it is part of", line)
        else:
            return node
        return yaml.ScalarNode(f"{_TAG}null", "", event.start_mark)

    def _put(self, node: yaml.Node) -> None:
        if not self._open:
            self.root = node
            return
        place = self._open[-1]
        if isinstance(place.node, yaml.SequenceNode):
            place.node.value.append(node)
        elif place.key is None:
            if isinstance(node, yaml.ScalarNode):
                if node.value in place.seen:
                    self._refuse(f"the key '{node.value}' is given twice", line_of(node))
                place.seen.add(node.value)
            place.key = node
        else:
            place.node.value.append((place.key, node))
            place.key = None

    def _refuse(self, message: str, line: int) -> None:
        self.problem = self.problem or (message, line)


def _tag_of(value: str) -> str:
    """The tag of a plain scalar."""
    return next((tag for tag, pattern in _SCALARS.items() if pattern.match(value)), f"{_TAG}str")


def _scalar(tag: Any, value: str, like: Any) -> yaml.ScalarNode:
    """A scalar at the place, and in the style, of a node or event."""
    return yaml.ScalarNode(tag, value, like.start_mark, style=like.style)
