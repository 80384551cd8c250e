"""Source ``yaml``: YAML files of any structure; each document, or each item of a list in it, is a text, fenced as YAML."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from outgrow.recipes.schema.sources import YamlSource
from outgrow.streaming.sources.document import BadRecordError, Document
from outgrow.streaming.sources.encoding import read_text
from outgrow.streaming.sources.text import encoding_meta
from outgrow.streaming.sources.yaml_nodes import Expander, YamlDocument, is_null, line_of, plain, read_documents, rendered

_BACKQUOTES = re.compile(r"`{3,}")


@dataclass(frozen=True, kw_only=True)
class YamlReader:
    """A document of the file is a text as its author wrote it, comments too; an item of a list is written anew."""

    encoding: str
    records: str
    fence: bool
    keep: tuple[str, ...]

    def read(self, path: Path, name: str) -> Iterator[Document | BadRecordError]:
        text, encoding = read_text(path, self.encoding)
        for item in read_documents(text):
            if isinstance(item, BadRecordError):
                yield item
            elif item.root is None:
                yield BadRecordError("the YAML document is empty", reason="empty", line=item.line)
            else:
                try:
                    yield from self._documents(item, item.root, name, encoding_meta(encoding))
                except BadRecordError as bad:
                    yield bad

    def _documents(
        self, item: YamlDocument, root: yaml.Node, name: str, meta: dict[str, Any]
    ) -> Iterator[Document | BadRecordError]:
        expander = Expander()
        if not self.records:
            kept = {key: plain(expander.copy(value)) for key, value in self._kept(root).items()}
            yield Document(content=self._text(item.text), source=f"{name}#{item.line}", meta={**meta, **kept})
            return
        for node in map(expander.copy, self._records(root)):
            if is_null(node):
                yield BadRecordError("the item is null", reason="empty", line=line_of(node))
                continue
            kept = {key: plain(value) for key, value in self._kept(node).items()}
            yield Document(content=self._text(rendered(node)), source=f"{name}#{line_of(node)}", meta={**meta, **kept})

    def _text(self, text: str) -> str:
        return fenced(text) if self.fence else text

    def _records(self, root: yaml.Node) -> list[yaml.Node]:
        """The items of the list at the key path ``records``."""
        node = root
        for key in self.records.split("."):
            values = _values(node)
            if key not in values:
                there = f"its keys: {', '.join(values)}" if values else "it holds no mapping there"
                raise BadRecordError(f"there is no '{key}' of '{self.records}'; {there}", line=line_of(node))
            node = values[key]
        if not isinstance(node, yaml.SequenceNode):
            raise BadRecordError(f"'{self.records}' is no list", line=line_of(node))
        items: list[yaml.Node] = node.value
        return items

    def _kept(self, node: yaml.Node) -> dict[str, yaml.Node]:
        values = _values(node)
        return {key: values[key] for key in self.keep if key in values}


def reader(source: YamlSource) -> YamlReader:
    """How files of the source are read."""
    return YamlReader(encoding=source.encoding, records=source.records, fence=source.fence, keep=source.keep)


def fenced(text: str) -> str:
    """``text`` between lines of backquotes, more of them than it holds in a row itself."""
    longest = max((len(match[0]) for match in _BACKQUOTES.finditer(text)), default=2)
    mark = "`" * (longest + 1)
    return f"{mark}yaml\n{text}\n{mark}"


def _values(node: yaml.Node) -> dict[str, yaml.Node]:
    """The values of a mapping whose keys are plain; empty for any other node."""
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {key.value: value for key, value in node.value if isinstance(key, yaml.ScalarNode)}
