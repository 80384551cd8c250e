"""Turns of dialogues as people write them, in the one form that the rest knows: OpenAI's (``document.Message``).

Every way in which they do not fit has a message that says which key, what was found there, and what is allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from outgrow.streaming.sources.document import BadRecordError, Message
from outgrow.streaming.sources.json_text import parse

ROLES = ("system", "developer", "user", "assistant", "tool")
_OPENAI_ROLES = {**{role: role for role in ROLES}, "bot": "assistant", "function": "tool"}
_CALL = "function_call"
_ASSISTANT_KEYS = ("reasoning_content", "tool_calls", _CALL)
_SHAREGPT_ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "bot", "chatgpt", "model", "bing", "bard", _CALL), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response", "tool_response"), "tool"),
}
_THINKING = re.compile(r"\s*<think>(.*?)</think>\n*", flags=re.DOTALL)


def described(value: Any) -> str:
    """A value's type in the words of JSON."""
    match value:
        case None:
            return "null"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "a text"
        case dict():
            return "an object"
        case list() | tuple():
            return "a list"
    return f"a {type(value).__name__}"


# --- dialogues --------------------------------------------------------------------------------------------------------


def from_openai(value: Any, key: str) -> tuple[Message, ...]:
    """Messages of a list of ``role`` and ``content``. Raises ``BadRecordError``; reason ``empty`` where none has content."""
    return _said(tuple(_message(item, at) for item, at in _items(value, key)), key)


def from_sharegpt(value: Any, key: str) -> tuple[Message, ...]:
    """Messages of a list of ``from`` and ``value``. Raises ``BadRecordError`` as ``from_openai``."""
    return _said(tuple(_sharegpt_message(item, at) for item, at in _items(value, key)), key)


def _items(value: Any, key: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a list, without what is null in them, each with the key path to name it by."""
    value = _parsed(value, key)
    if _is_columns(value):
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise BadRecordError(f"{key} is {described(value)}; a list of messages is needed")
    for number, item in enumerate(value):
        at = f"{key}[{number}]"
        if not isinstance(item, dict):
            raise BadRecordError(f"{at} is {described(item)}; a message is an object")
        yield {name: field for name, field in item.items() if field is not None}, at


def _is_columns(value: Any) -> bool:
    """Whether a list of objects is given as an object of lists of one length, which ``datasets`` makes of it."""
    columns = list(value.values()) if isinstance(value, dict) else []
    return bool(columns) and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns)


def _said(messages: tuple[Message, ...], key: str) -> tuple[Message, ...]:
    if not any(message["content"] or message.get("tool_calls") or message.get("reasoning_content") for message in messages):
        raise BadRecordError(f"{key} holds no message with content", reason="empty")
    return messages


# --- one message ------------------------------------------------------------------------------------------------------


def _message(item: dict[str, Any], at: str) -> Message:
    if "role" not in item:
        other = "; for the form of from and value set shape: {kind: sharegpt}" if "from" in item else ""
        raise BadRecordError(f"{at} has no role; its keys: {', '.join(item) or 'none'}{other}")
    role, content = _role(item.pop("role"), _OPENAI_ROLES, f"{at}.role"), item.pop("content", None)
    if content is None and not any(item.get(key) for key in ("tool_calls", _CALL, "reasoning_content")):
        raise BadRecordError(f"{at} has no content; its keys: {', '.join(['role', *item])}")
    return _built(role, _content("" if content is None else content, f"{at}.content"), item, at)


def _sharegpt_message(item: dict[str, Any], at: str) -> Message:
    if "from" not in item or "value" not in item:
        other = "; for the form of role and content set shape: {kind: messages}" if "role" in item else ""
        raise BadRecordError(
            f"{at} has no {'from' if 'from' not in item else 'value'}; its keys: {', '.join(item) or 'none'}{other}"
        )
    speaker, value = item.pop("from"), item.pop("value")
    role = _role(speaker, _SHAREGPT_ROLES, f"{at}.from")
    if speaker == _CALL:
        calls = _parsed(value, f"{at}.value")
        return _built(role, "", {**item, "tool_calls": calls if isinstance(calls, list) else [calls]}, at)
    return _built(role, _content(value, f"{at}.value"), item, at)


def _built(role: str, content: str, others: dict[str, Any], at: str) -> Message:
    """The message; ``others`` are its keys beside these two, checked where they mean something and kept where they do not."""
    message: Message = {"role": role, "content": content}
    if others:
        message |= {key: value for key, value in others.items() if key not in (*message, *_ASSISTANT_KEYS)}
        message |= _of_assistant(others, role, at)
        for key in ("name", "tool_call_id", "reasoning_content"):
            if not isinstance(message.get(key, ""), str):
                raise BadRecordError(f"{at}.{key} is {described(message[key])}; a text is needed")
    if role == "assistant" and "reasoning_content" not in message and (found := _THINKING.match(content)):
        message["content"] = content[found.end() :]
        if thinking := found[1].strip("\n"):
            message["reasoning_content"] = thinking
    return message


def _of_assistant(others: dict[str, Any], role: str, at: str) -> dict[str, Any]:
    """What only the assistant has, where it is not empty."""
    given = {key: others[key] for key in _ASSISTANT_KEYS if others.get(key)}
    if given and role != "assistant":
        raise BadRecordError(f"{at}.{next(iter(given))} stands in a message of the {role}; only the assistant has it")
    if _CALL in given:
        given.setdefault("tool_calls", [given.pop(_CALL)])
    if "tool_calls" in given:
        given["tool_calls"] = _tool_calls(given["tool_calls"], f"{at}.tool_calls")
    return given


def _role(value: Any, roles: dict[str, str], at: str) -> str:
    role = roles.get(value) if isinstance(value, str) else None
    if role is None:
        found = f"'{value[:40]}'" if isinstance(value, str) else described(value)
        raise BadRecordError(f"{at} is {found}; allowed: {', '.join(roles)}")
    return role


def _content(value: Any, at: str) -> str:
    """A text, or the texts of a list of parts, one after the other."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise BadRecordError(f"{at} is {described(value)}; allowed: a text, or a list of parts of type text")
    texts = []
    for number, part in enumerate(value):
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text" or not isinstance(text, str):
            found = f"of type '{kind}'" if kind != "text" else described(part)
            raise BadRecordError(f"{at}[{number}] is {found}; allowed: parts of type text")
        texts.append(text)
    return "".join(texts)


# --- tools ------------------------------------------------------------------------------------------------------------


def tools_of(value: Any, key: str) -> tuple[dict[str, Any], ...]:
    """The functions that may be called, in OpenAI's form, from a list of them or a text that holds one as JSON.

    ``{name, parameters}`` without ``function`` around it is taken too. Raises ``BadRecordError``.
    """
    if isinstance(value, str):
        value = _parsed(value, key) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        raise BadRecordError(f"{key} is {described(value)}; a list of functions is needed")
    return tuple(_tool(_parsed(item, f"{key}[{number}]"), f"{key}[{number}]") for number, item in enumerate(value))


def _tool(item: Any, at: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise BadRecordError(f"{at} is {described(item)}; a function is an object")
    function = item.get("function", item)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecordError(
            f"{at} names no function; allowed: {{type: function, function: {{name, description, parameters}}}}"
        )
    return {"type": "function", **item} if "function" in item else {"type": "function", "function": item}


def _tool_calls(value: Any, at: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, but for ``arguments``: always the object, which chat templates write as JSON themselves."""
    if not isinstance(value, list | tuple):
        raise BadRecordError(f"{at} is {described(value)}; a list of calls is needed")
    return [_tool_call(item, f"{at}[{number}]") for number, item in enumerate(value)]


def _tool_call(item: Any, at: str) -> dict[str, Any]:
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecordError(f"{at} names no function; allowed: {{type: function, function: {{name, arguments}}}}")
    arguments = function.get("arguments")
    arguments = {} if arguments in (None, "") else _parsed(arguments, f"{at}.function.arguments")
    if not isinstance(arguments, dict):
        raise BadRecordError(f"{at}.function.arguments is {described(arguments)}; an object is needed, or its JSON")
    call = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": item["id"], **call} if item.get("id") is not None else call


def _parsed(value: Any, at: str) -> Any:
    """The value of a text that holds JSON; what is no text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse(value)
    except BadRecordError as error:
        raise BadRecordError(f"{at}: {error}") from None
