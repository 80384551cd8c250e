"""PromQL read just far enough for tests: selectors with their labels, and every small change that makes an expression wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_TOKEN = re.compile(
    r"""(?P<text>"[^"]*")|(?P<range>\[\w+(?::\w+)?\])|(?P<number>\b\d+(?:\.\d+)?(?:e\d+)?\b(?![a-z]))|(?P<duration>\b\d+[smhdw]\b)"""
    r"""|(?P<word>[A-Za-z_]\w*)|(?P<mark>=~|!~|==|!=|>=|<=|[-+*/<>=(){},])|(?P<space>\s+)|(?P<other>.)""",
    re.DOTALL,
)
_GROUPING = ("by", "on", "ignoring", "without", "group_left")
_TIMES = 1000


@dataclass(frozen=True)
class Token:
    kind: str
    text: str


def tokens(expression: str) -> list[Token]:
    found = [Token(match.lastgroup or "", match[0]) for match in _TOKEN.finditer(expression)]
    assert not [token for token in found if token.kind == "other"], [token for token in found if token.kind == "other"]
    return found


@dataclass(frozen=True)
class Names:
    """Metrics with the labels that are matched on them, and the labels that are grouped by."""

    selectors: tuple[tuple[str, tuple[str, ...]], ...]
    grouped: frozenset[str]


def names(expression: str) -> Names:
    """What an expression names: words before a brace or by themselves, and label lists after a grouping word."""
    parts = [token for token in tokens(expression) if token.kind != "space"]
    selectors, grouped, number = list[tuple[str, tuple[str, ...]]](), set[str](), 0
    while number < len(parts):
        token, after = parts[number], parts[number + 1].text if number + 1 < len(parts) else ""
        if token.kind == "word" and token.text in _GROUPING and after == "(":
            end = _closing(parts, number, ")")
            grouped |= {one.text for one in parts[number:end] if one.kind == "word"} - {token.text}
            number = end
        elif token.kind == "word" and after == "{":
            end = _closing(parts, number, "}")
            labels = [
                one.text
                for one, next_ in zip(parts[number + 2 : end], parts[number + 3 : end], strict=False)
                if _is_label(one, next_)
            ]
            selectors.append((token.text, tuple(labels)))
            number = end
        elif (
            token.kind == "word"
            and after not in ("(", *_GROUPING)
            and token.text not in ("and", "or", "unless", "offset", "bool", *_GROUPING)
        ):
            selectors.append((token.text, ()))
        number += 1
    return Names(tuple(selectors), frozenset(grouped))


def wrong_units(expression: str) -> Iterator[str]:
    """The expression with one number a thousand times as large or as small, or one time span so."""
    parts = tokens(expression)
    for number, token in enumerate(parts):
        if token.kind == "number" and float(token.text):
            yield _with(parts, number, repr(float(token.text) * _TIMES))
            yield _with(parts, number, f"{float(token.text) / _TIMES:.12f}".rstrip("0"))
        elif token.kind == "duration":
            yield _with(parts, number, _span(token.text, 1 / _TIMES))
        elif token.kind == "range":
            span, _, step = token.text[1:-1].partition(":")
            yield _with(parts, number, f"[{_span(span, 1 / _TIMES)}{':' + step if step else ''}]")
            if step:
                yield _with(parts, number, f"[{span}:{_span(step, _TIMES)}]")


def wrong_labels(expression: str) -> Iterator[str]:
    """The expression with one label's name changed, in a matcher or a grouping, or one value, or one of several values."""
    parts = tokens(expression)
    depth_of_grouping, last_word = 0, ""
    for number, token in enumerate(parts):
        following = next((one for one in parts[number + 1 :] if one.kind != "space"), Token("", ""))
        if token.kind == "text":
            values = token.text[1:-1].split("|")
            for place in range(len(values)):
                yield _with(parts, number, '"' + "|".join([*values[:place], "wrong", *values[place + 1 :]]) + '"')
        elif token.text == "(" and last_word in _GROUPING:
            depth_of_grouping = 1
        elif token.text == ")":
            depth_of_grouping = 0
        elif token.kind == "word" and (depth_of_grouping or _is_label(token, following)):
            yield _with(parts, number, "wrong")
        if token.kind != "space":
            last_word = token.text if token.kind == "word" else ""


def times(span: str, factor: float) -> str:
    """A time span so many times as long."""
    return _span(span, factor)


def _span(text: str, factor: float) -> str:
    milliseconds = int(text[:-1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[text[-1]] * 1000 * factor
    return f"{max(1, round(milliseconds))}ms"


def _is_label(token: Token, following: Token) -> bool:
    return token.kind == "word" and following.text in ("=", "=~", "!=", "!~")


def _closing(parts: list[Token], number: int, mark: str) -> int:
    return next(place for place in range(number, len(parts)) if parts[place].text == mark)


def _with(parts: list[Token], number: int, text: str) -> str:
    return "".join(token.text if place != number else text for place, token in enumerate(parts))
