"""Records of JSON lines, JSON, Parquet to documents: what the ``shape`` of a source says a record is.

A record is an object, or for dialogues the list of messages itself. What a shape does not take of it stays as metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from outgrow.recipes.schema.sources import AlpacaShape, MessagesShape, PreferenceShape, Shape, ShareGptShape, TextShape
from outgrow.streaming.sources.document import BadRecordError, Content, Dialogue, Document, Message, PreferencePair
from outgrow.streaming.sources.messages import described, from_openai, from_sharegpt, tools_of

_TOOLS = "tools"
_SYSTEM = "system"
_NAMED_KEYS = 10
"""At most so many keys of a record are named in an error."""
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}


def document(shape: Shape, record: Any, source: str) -> Document:
    """The document that a record is; ``record`` is plain JSON values.

    Raises ``BadRecordError`` saying which key does not fit, what was found and what is allowed; with reason ``empty`` where the
    record has no text.
    """
    try:
        if isinstance(shape, TextShape):  # what most records are
            content: Content = _text(_object(record), shape.field)
            used: tuple[str, ...] = (shape.field,)
        else:
            content, used = _conversation(shape, record)
    except BadRecordError as bad:
        bad.source = source
        raise
    meta = {key: value for key, value in record.items() if key not in used} if isinstance(record, dict) else {}
    return Document(content=content, source=source, meta=meta)


def needed_keys(shape: Shape) -> tuple[str, ...]:
    """The keys that every record of the shape has."""
    match shape:
        case TextShape() | MessagesShape() | ShareGptShape():
            return (shape.field,)
        case AlpacaShape():
            return shape.instruction, shape.output
        case PreferenceShape():
            return shape.chosen, shape.rejected


def _conversation(shape: Shape, record: Any) -> tuple[Content, tuple[str, ...]]:
    """The content, and the keys of the record that it was made of."""
    match shape:
        case MessagesShape() if isinstance(record, list):
            return Dialogue(messages=from_openai(record, "the record")), ()
        case ShareGptShape() if isinstance(record, list):
            return Dialogue(messages=from_sharegpt(record, "the record")), ()
        case MessagesShape():
            messages = from_openai(_value(_object(record), shape.field), shape.field)
            return Dialogue(messages=messages, tools=_tools(record)), (shape.field, _TOOLS)
        case ShareGptShape():
            return _sharegpt(shape, _object(record)), (shape.field, _TOOLS, _SYSTEM)
        case AlpacaShape():
            return _alpaca(shape, _object(record)), (shape.instruction, shape.input, shape.output)
        case PreferenceShape():
            return _preference(shape, _object(record)), (shape.prompt, shape.chosen, shape.rejected, _TOOLS)
    raise AssertionError(shape)


# --- keys -------------------------------------------------------------------------------------------------------------


def _object(record: Any) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise BadRecordError(f"a JSON object is needed, not {described(record)}")
    return record


def _value(record: Mapping[str, Any], key: str) -> Any:
    """What stands under a key. Raises ``BadRecordError`` where there is no such key, with reason ``empty`` where it is null."""
    if key not in record:
        names = list(record)
        more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
        raise BadRecordError(f"it has no key '{key}'; its keys: {', '.join(names[:_NAMED_KEYS]) or 'none'}{more}")
    if record[key] is None:
        raise BadRecordError(f"{key} is null", reason="empty")
    return record[key]


def _text(record: Mapping[str, Any], key: str) -> str:
    value = _value(record, key)
    if not isinstance(value, str):
        raise BadRecordError(f"{key} is {described(value)}; a text is needed")
    return value


def _tools(record: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    return tools_of(record.get(_TOOLS), _TOOLS)


# --- dialogues --------------------------------------------------------------------------------------------------------


def _sharegpt(shape: ShareGptShape, record: Mapping[str, Any]) -> Dialogue:
    messages = from_sharegpt(_value(record, shape.field), shape.field)
    system = record.get(_SYSTEM)
    if not isinstance(system, str | None):
        raise BadRecordError(f"{_SYSTEM} is {described(system)}; a text is needed")
    if system:
        if messages[0]["role"] == "system" and messages[0]["content"] != system:
            raise BadRecordError(
                f"{_SYSTEM} is given beside a dialogue that begins with another system prompt; allowed: one of them"
            )
        messages = ({"role": "system", "content": system}, *messages[messages[0]["role"] == "system" :])
    return Dialogue(messages=messages, tools=_tools(record))


def _alpaca(shape: AlpacaShape, record: Mapping[str, Any]) -> Dialogue:
    parts = [_text(record, shape.instruction)]
    if record.get(shape.input) is not None:
        parts.append(_text(record, shape.input))
    question, answer = "\n\n".join(part for part in parts if part), _text(record, shape.output)
    for key, text in ((shape.instruction, question), (shape.output, answer)):
        if not text or text.isspace():
            raise BadRecordError(f"{key} has no text", reason="empty")
    return Dialogue(messages=from_openai([_turn("user", question), _turn("assistant", answer)], "the record"))


# --- preference pairs -------------------------------------------------------------------------------------------------


def _preference(shape: PreferenceShape, record: Mapping[str, Any]) -> PreferencePair:
    prompt = _prompt(record, shape.prompt)
    chosen, rejected = _answer(record, shape.chosen, prompt), _answer(record, shape.rejected, prompt)
    if not prompt or (chosen[0]["role"] != "assistant" and rejected[0]["role"] != "assistant"):
        prompt, chosen, rejected = _divided(prompt, chosen, rejected, shape)
    for key, answer in ((shape.chosen, chosen), (shape.rejected, rejected)):
        if answer[0]["role"] != "assistant":
            raise BadRecordError(
                f"{key} goes on with a message of the {answer[0]['role']} after the prompt; "
                f"allowed: the answer alone, or the prompt word for word and the answer"
            )
    if chosen == rejected:
        raise BadRecordError(f"{shape.chosen} and {shape.rejected} are the same; they must differ")
    return PreferencePair(prompt=Dialogue(messages=prompt, tools=_tools(record)), chosen=chosen, rejected=rejected)


def _prompt(record: Mapping[str, Any], key: str) -> tuple[Message, ...]:
    """Its messages; none where the record has no prompt of its own."""
    value = record.get(key)
    if value is None or value == "" or value == []:
        return ()
    messages = from_openai(_turns(value, "user", key), key)
    last = messages[-1]
    return messages[:-1] if last == _turn("assistant", "") else messages  # HH's prompt ends with the beginning of an answer


def _answer(record: Mapping[str, Any], key: str, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages under a key, less those of the prompt where it begins with them."""
    value = _value(record, key)
    if isinstance(value, str) and not prompt and not _HH_TURN.match(value):
        raise BadRecordError(f"{key} is a text without a prompt; allowed: a prompt beside it, or a list of messages")
    messages = from_openai(_turns(value, "assistant", key), key)
    return messages[len(prompt) :] if _alike(messages, prompt) == len(prompt) < len(messages) else messages


def _divided(
    prompt: tuple[Message, ...], chosen: tuple[Message, ...], rejected: tuple[Message, ...], shape: PreferenceShape
) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    """Prompt and answers of two whole dialogues: the prompt is how both begin, and ends with the one that was given."""
    common = min(_alike(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if not common:
        raise BadRecordError(f"{shape.chosen} and {shape.rejected} begin with different messages; there is no prompt")
    if prompt and _alike(chosen[max(0, common - len(prompt)) : common], prompt) != len(prompt):
        raise BadRecordError(
            f"{shape.prompt} is not what {shape.chosen} and {shape.rejected} begin with; remove it, or correct it"
        )
    return chosen[:common], chosen[common:], rejected[common:]


def _alike(one: tuple[Message, ...], other: tuple[Message, ...]) -> int:
    """How many messages both begin with: the same role says the same, whatever else is noted of it."""
    keys = ("role", "content", "tool_calls")
    for number, (left, right) in enumerate(zip(one, other, strict=False)):
        if any(left.get(key) != right.get(key) for key in keys):
            return number
    return min(len(one), len(other))


def _turns(value: Any, role: str, key: str) -> Any:
    """A text as messages: those of a dialogue as Anthropic's HH writes it, else one of ``role``. A list as it is."""
    if not isinstance(value, str):
        return value
    if not value or value.isspace():
        raise BadRecordError(f"{key} has no text", reason="empty")
    if not _HH_TURN.match(value):
        return [_turn(role, value)]
    parts = _HH_TURN.split(value)
    return [_turn(_HH_ROLES[name], text.strip()) for name, text in zip(parts[1::2], parts[2::2], strict=True)]


def _turn(role: str, text: str) -> Message:
    return {"role": role, "content": text}
