"""Records to documents: every shape, and what is said of a record that does not have it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from pydantic import TypeAdapter

from outgrow.recipes.schema.sources import Shape
from outgrow.streaming.sources import BadRecordError, Dialogue, Document, PreferencePair
from outgrow.streaming.sources.document import Message
from outgrow.streaming.sources.shapes import document, needed_keys

SHAPE: TypeAdapter[Any] = TypeAdapter(Shape)


def read(kind: str, record: Any, **keys: str) -> Document:
    before = json.dumps(record)
    found = document(SHAPE.validate_python({"kind": kind, **keys}), record, "f#1")
    assert json.dumps(record) == before, "the record was changed"
    assert found.source == "f#1"
    return found


def dialogue(kind: str, record: Any, **keys: str) -> Dialogue:
    content = read(kind, record, **keys).content
    assert isinstance(content, Dialogue)
    return content


def pair(record: Any, **keys: str) -> PreferencePair:
    content = read("preference", record, **keys).content
    assert isinstance(content, PreferencePair)
    return content


def refused(kind: str, record: Any, message: str, reason: str = "malformed") -> None:
    with pytest.raises(BadRecordError, match=message) as caught:
        read(kind, record)
    assert (caught.value.reason, caught.value.source) == (reason, "f#1")


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


# --- text -------------------------------------------------------------------------------------------------------------


def test_text_and_its_metadata() -> None:
    assert read("text", {"text": "a", "n": [1], "m": None}) == Document(content="a", source="f#1", meta={"n": [1], "m": None})
    assert read("text", {"body": "b", "text": "a"}, field="body").meta == {"text": "a"}
    assert read("text", {"text": ""}).content == ""
    refused("text", {"text": None}, "text is null", "empty")
    refused("text", {"text": {}}, "text is an object; a text is needed")
    refused("text", {f"k{n}": 1 for n in range(14)}, "no key 'text'; its keys: k0, .*, k9 and 4 more")
    refused("text", ["text"], "a JSON object is needed, not a list")


# --- messages ---------------------------------------------------------------------------------------------------------


def test_openai_messages() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    record = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}], "name": "ann"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "done", "reasoning_content": "hm", "tool_calls": None, "refusal": None},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        "topic": "t",
    }
    found = read("messages", record)
    assert found.meta == {"topic": "t"}
    assert found.content == Dialogue(
        messages=(
            {"role": "system", "content": "s"},
            {"role": "user", "content": "one two", "name": "ann"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "call_1"},
            {"role": "assistant", "content": "done", "reasoning_content": "hm"},
        ),
        tools=({"type": "function", "function": {"name": "f", "parameters": {}}},),
    )


def test_saigas_messages_and_a_record_that_is_the_list() -> None:
    turns = [{"role": "system", "content": "s"}, user("u"), {"role": "bot", "content": "b", "score": 5}]
    expected = ({"role": "system", "content": "s"}, user("u"), bot("b", score=5))
    assert dialogue("messages", {"messages": turns}).messages == expected
    assert read("messages", turns) == Document(content=Dialogue(messages=expected), source="f#1")
    assert dialogue("messages", {"chat": turns}, field="chat").messages == expected
    assert dialogue("messages", {"messages": json.dumps(turns)}).messages == expected


def test_messages_as_columns() -> None:
    """``datasets`` turns a list of objects into an object of lists."""
    columns = {"role": ["user", "bot"], "content": ["u", "b"], "name": [None, None]}
    assert dialogue("messages", {"messages": columns}).messages == (user("u"), bot("b"))
    refused("messages", {"messages": {"role": ["user"], "content": ["u", "b"]}}, "messages is an object; a list of messages")


@pytest.mark.parametrize(
    ("content", "answer", "thinking"),
    [
        ("<think>\nwhy\n</think>\n\nbecause", "because", "why"),
        ("<think>why</think>because", "because", "why"),
        (" \n<think>a <b> c</think>\nx <think>y</think>", "x <think>y</think>", "a <b> c"),
        ("<think>\n\n</think>\n\nbecause", "because", None),
        ("<think></think>because", "because", None),
        ("<think>never ends", "<think>never ends", None),
        ("first <think>a</think> b", "first <think>a</think> b", None),
        ("<think>only</think>", "", "only"),
    ],
)
def test_thinking_that_begins_an_answer_is_set_apart(content: str, answer: str, thinking: str | None) -> None:
    expected = bot(answer) if thinking is None else bot(answer, reasoning_content=thinking)
    assert dialogue("messages", {"messages": [user("u"), bot(content)]}).messages[1] == expected
    assert dialogue("messages", {"messages": [user(content), bot("b")]}).messages[0] == user(content)
    given = bot(content, reasoning_content="given")
    assert dialogue("messages", {"messages": [user("u"), given]}).messages[1] == given


@pytest.mark.parametrize(
    ("arguments", "expected"), [('{"x": 1}', {"x": 1}), ({"x": 1}, {"x": 1}), ("", {}), (None, {}), ("{}", {})]
)
def test_tool_calls_in_all_their_forms(arguments: Any, expected: dict[str, Any]) -> None:
    plain = {"type": "function", "function": {"name": "f", "arguments": expected}}
    function = {"name": "f", "arguments": arguments}
    for message in (
        {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "assistant", "content": None, "tool_calls": [function]},
        {"role": "assistant", "content": "", "function_call": function},
    ):
        assert dialogue("messages", {"messages": [user("u"), message]}).messages[1] == bot("", tool_calls=[plain])
    shared = {"conversations": [{"from": "human", "value": "u"}, {"from": "function_call", "value": json.dumps(function)}]}
    assert dialogue("sharegpt", shared).messages[1] == bot("", tool_calls=[plain])
    answered = dialogue("messages", {"messages": [user("u"), {"role": "function", "name": "f", "content": "1"}]})
    assert answered.messages[1] == {"role": "tool", "content": "1", "name": "f"}


@pytest.mark.parametrize(
    "tools",
    [
        [{"name": "f", "parameters": {}}],
        [{"type": "function", "function": {"name": "f", "parameters": {}}}],
        [{"function": {"name": "f", "parameters": {}}}],
        ['{"name": "f", "parameters": {}}'],
        '[{"name": "f", "parameters": {}}]',
    ],
)
@pytest.mark.parametrize("kind", ["messages", "sharegpt"])
def test_tools_in_all_their_forms(tools: Any, kind: str) -> None:
    turns = {"messages": [user("u")], "conversations": [{"from": "human", "value": "u"}]}
    found = dialogue(kind, {**turns, "tools": tools})
    assert found.tools == ({"type": "function", "function": {"name": "f", "parameters": {}}},)
    for nothing in (None, "", " ", [], "[]"):
        assert dialogue(kind, {**turns, "tools": nothing}).tools == ()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages: it is not JSON"),
        (3, "messages is a number; a list of messages is needed"),
        ({}, "messages is an object; a list of messages is needed"),
        (["hello"], r"messages\[0\] is a text; a message is an object"),
        ([user("u"), None], r"messages\[1\] is null; a message is an object"),
        ([{"content": "u"}], r"messages\[0\] has no role; its keys: content$"),
        ([{}], r"messages\[0\] has no role; its keys: none"),
        ([{"from": "human", "value": "u"}], r"messages\[0\] has no role; .*set shape: \{kind: sharegpt\}"),
        ([{"role": "asistant", "content": "a"}], r"messages\[0\]\.role is 'asistant'; allowed: system, developer, user, .*bot"),
        ([{"role": 1, "content": "a"}], r"messages\[0\]\.role is a number; allowed"),
        ([user("u"), {"role": "assistant"}], r"messages\[1\] has no content; its keys: role"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content is a number; allowed: a text, or a list of parts"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"content\[0\] is of type 'image_url'; allowed: parts of type text",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\] is an object; allowed: parts of type text"),
        ([{"role": "user", "content": [7]}], r"content\[0\] is a number; allowed"),
        ([{"role": "user", "content": "u", "name": 3}], r"messages\[0\]\.name is a number; a text is needed"),
        ([{"role": "tool", "content": "u", "tool_call_id": 3}], r"tool_call_id is a number; a text is needed"),
        ([bot("a", reasoning_content=["x"])], "reasoning_content is a list; a text is needed"),
        ([{"role": "user", "content": "u", "reasoning_content": "x"}], "reasoning_content stands in a message of the user"),
        ([{"role": "user", "content": "u", "tool_calls": [{"name": "f"}]}], "tool_calls stands in a message of the user"),
        ([bot("a", tool_calls={"name": "f"})], "tool_calls is an object; a list of calls is needed"),
        ([bot("a", tool_calls=["f"])], r"tool_calls\[0\] names no function; allowed: \{type: function"),
        ([bot("a", tool_calls=[{"function": {"name": 1}}])], r"tool_calls\[0\] names no function"),
        ([bot("a", tool_calls=[{"name": "f", "arguments": "{"}])], r"tool_calls\[0\]\.function\.arguments: it is not JSON"),
        ([bot("a", tool_calls=[{"name": "f", "arguments": [1]}])], r"arguments is a list; an object is needed"),
    ],
)
def test_messages_that_do_not_fit_are_explained(messages: Any, message: str) -> None:
    refused("messages", {"messages": messages}, message)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (5, "tools is a number; a list of functions"),
        ("{", "tools: it is not JSON"),
        ([1], r"tools\[0\] is a number; a function is an object"),
        ([{"type": "function"}], r"tools\[0\] names no function"),
        ([{"function": {"name": None}}], r"tools\[0\] names no function"),
    ],
)
def test_tools_that_do_not_fit_are_explained(tools: Any, message: str) -> None:
    refused("messages", {"messages": [user("u")], "tools": tools}, message)


@pytest.mark.parametrize("messages", [[], None, [user("")], [{"role": "system", "content": ""}, bot("")], "[]"])
def test_dialogues_in_which_nothing_is_said_are_empty(messages: Any) -> None:
    refused("messages", {"messages": messages}, "null|no message with content", "empty")


# --- ShareGPT, Alpaca -------------------------------------------------------------------------------------------------


def test_sharegpt() -> None:
    turns = [
        {"from": "system", "value": "s"},
        *[{"from": name, "value": name} for name in ("human", "user")],
        *[{"from": name, "value": name, "weight": 0} for name in ("gpt", "assistant", "bot", "chatgpt")],
        *[{"from": name, "value": name} for name in ("tool", "observation")],
        {"from": "gpt", "value": "<think>a</think>b"},
    ]
    expected = (
        {"role": "system", "content": "s"},
        user("human"),
        user("user"),
        *[bot(name, weight=0) for name in ("gpt", "assistant", "bot", "chatgpt")],
        *[{"role": "tool", "content": name} for name in ("tool", "observation")],
        bot("b", reasoning_content="a"),
    )
    found = read("sharegpt", {"conversations": turns, "id": 5})
    assert found.content == Dialogue(messages=expected)
    assert found.meta == {"id": 5}
    assert dialogue("sharegpt", turns).messages == expected
    assert dialogue("sharegpt", {"conversations": turns[1:], "system": "s"}).messages == expected
    assert dialogue("sharegpt", {"conversations": turns, "system": "s"}).messages == expected
    assert dialogue("sharegpt", {"conversations": turns[1:], "system": ""}).messages == expected[1:]
    assert dialogue("sharegpt", {"conversations": turns[1:], "system": None}).messages == expected[1:]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"conversations": [{"from": "narrator", "value": "x"}]},
            r"conversations\[0\]\.from is 'narrator'; allowed: .*human.*gpt",
        ),
        ({"conversations": [{"value": "x"}]}, r"conversations\[0\] has no from; its keys: value"),
        ({"conversations": [{"from": "gpt"}]}, r"conversations\[0\] has no value; its keys: from"),
        ({"conversations": [{"role": "user", "content": "x"}]}, r"has no from; .*set shape: \{kind: messages\}"),
        ({"conversations": [{"from": "human", "value": {}}]}, r"conversations\[0\]\.value is an object"),
        ({"conversations": [{"from": "human", "value": "x"}], "system": 1}, "system is a number; a text"),
        ({"conversations": [{"from": "system", "value": "a"}], "system": "b"}, "system is given beside a dialogue that begins"),
        ({"messages": []}, "no key 'conversations'; its keys: messages"),
        ({"conversations": [{"from": "function_call", "value": "f(1)"}]}, r"conversations\[0\]\.value: it is not JSON"),
    ],
)
def test_sharegpt_that_does_not_fit_is_explained(record: Any, message: str) -> None:
    refused("sharegpt", record, message)


def test_alpaca() -> None:
    record = {"instruction": "Переведи", "input": "cat", "output": "кот", "source": "x"}
    found = read("alpaca", record)
    assert found.content == Dialogue(messages=(user("Переведи\n\ncat"), bot("кот")))
    assert found.meta == {"source": "x"}
    for nothing in ({"input": ""}, {"input": None}):
        assert dialogue("alpaca", {**record, **nothing}).messages[0] == user("Переведи")
    del record["input"]
    assert dialogue("alpaca", record).messages[0] == user("Переведи")
    assert dialogue("alpaca", {"q": "a", "input": "i", "a": "b"}, instruction="q", output="a", input="i").messages == (
        user("a"),
        bot("b"),
    )
    assert dialogue("alpaca", {**record, "output": "<think>t</think>o"}).messages[1] == bot("o", reasoning_content="t")
    refused("alpaca", {**record, "output": " "}, "output has no text", "empty")
    refused("alpaca", {**record, "instruction": ""}, "instruction has no text", "empty")
    refused("alpaca", {**record, "output": None}, "output is null", "empty")
    refused("alpaca", {**record, "input": ["x"]}, "input is a list; a text is needed")
    refused("alpaca", {"instruction": "x"}, "no key 'output'; its keys: instruction")


# --- preference pairs -------------------------------------------------------------------------------------------------

QUESTION = Dialogue(messages=(user("q"),))


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("q", "good", "bad"),
        ([user("q")], "good", "bad"),
        ([user("q")], [bot("good")], [bot("bad")]),
        ("q", [bot("good")], "bad"),
        ("q", [user("q"), bot("good")], [user("q"), bot("bad")]),
        ([user("q")], [user("q"), bot("good")], [{"role": "user", "content": "q", "id": 7}, {"role": "bot", "content": "bad"}]),
        (None, [user("q"), bot("good")], [user("q"), bot("bad")]),
        ("", [user("q"), bot("good")], [user("q"), bot("bad")]),
        (None, "\n\nHuman: q\n\nAssistant: good", "\n\nHuman: q\n\nAssistant: bad"),
        ("\n\nHuman: q\n\nAssistant:", " good", " bad"),
    ],
)
def test_preference_pairs_in_all_their_forms(prompt: Any, chosen: Any, rejected: Any) -> None:
    record = {"chosen": chosen, "rejected": rejected, "score": 0.5} | ({} if prompt is None else {"prompt": prompt})
    found = read("preference", record)
    assert found.meta == {"score": 0.5}
    assert isinstance(found.content, PreferencePair)
    assert found.content.prompt == QUESTION
    assert [message["content"].strip() for message in (*found.content.chosen, *found.content.rejected)] == ["good", "bad"]
    assert {message["role"] for message in (*found.content.chosen, *found.content.rejected)} == {"assistant"}


def test_the_prompt_of_two_dialogues_is_what_they_have_in_common() -> None:
    system = {"role": "system", "content": "s"}
    start = [system, user("q"), bot("a"), user("r")]
    found = pair({"chosen": [*start, bot("good")], "rejected": [*start, bot("bad"), user("more"), bot("x")]})
    assert (found.prompt.messages, found.chosen) == (tuple(start), (bot("good"),))
    assert found.rejected == (bot("bad"), user("more"), bot("x"))
    # one that goes on where the other ends: each keeps an answer
    found = pair({"chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("a"), user("r"), bot("b")]})
    assert (found.prompt, found.chosen) == (QUESTION, (bot("a"),))
    assert found.rejected == (bot("a"), user("r"), bot("b"))
    # a prompt that leaves out the system prompt of the dialogues
    found = pair({"prompt": "q", "chosen": [system, user("q"), bot("a")], "rejected": [system, user("q"), bot("b")]})
    assert found.prompt.messages == (system, user("q"))
    # tools, thinking, other keys
    tools = [{"name": "f"}]
    found = pair({"p": "q", "c": "<think>t</think>a", "r": "b", "tools": tools}, prompt="p", chosen="c", rejected="r")
    assert found.prompt.tools == ({"type": "function", "function": {"name": "f"}},)
    assert found.chosen == (bot("a", reasoning_content="t"),)


@pytest.mark.parametrize(
    ("record", "message", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "no key 'rejected'; its keys: prompt, chosen", "malformed"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected is null", "empty"),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "rejected has no text", "empty"),
        ({"prompt": "q", "chosen": [], "rejected": "b"}, "chosen holds no message", "empty"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "prompt has no text", "empty"),
        ({"chosen": "a", "rejected": "b"}, "chosen is a text without a prompt; allowed: a prompt beside it", "malformed"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same; they must differ", "malformed"),
        ({"chosen": [user("q"), bot("a")], "rejected": [user("z"), bot("a")]}, "begin with different messages", "malformed"),
        ({"chosen": [user("q")], "rejected": [user("q")]}, "begin with different messages", "malformed"),
        (
            {"chosen": [user("q"), user("r"), bot("a")], "rejected": [user("q"), user("s"), bot("a")]},
            "chosen goes on with a message of the user after the prompt",
            "malformed",
        ),
        (
            {"prompt": "z", "chosen": [user("q"), bot("a")], "rejected": [user("q"), bot("b")]},
            "prompt is not what chosen and rejected begin with",
            "malformed",
        ),
        (
            {"prompt": "z", "chosen": [user("q"), bot("a")], "rejected": "b"},
            "chosen goes on with a message of the user after the prompt; allowed: the answer alone, or",
            "malformed",
        ),
        (
            {"prompt": {"x": 1}, "chosen": "a", "rejected": "b"},
            "prompt is an object; a list of messages is needed",
            "malformed",
        ),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "chosen is a number; a list of messages is needed", "malformed"),
        ([], "a JSON object is needed, not a list", "malformed"),
    ],
)
def test_preference_pairs_that_do_not_fit_are_explained(record: Any, message: str, reason: str) -> None:
    refused("preference", record, message, reason)


def test_the_keys_that_every_record_needs() -> None:
    kinds = {kind: needed_keys(SHAPE.validate_python({"kind": kind})) for kind in ("text", "messages", "sharegpt")}
    assert kinds == {"text": ("text",), "messages": ("messages",), "sharegpt": ("conversations",)}
    assert needed_keys(SHAPE.validate_python({"kind": "alpaca", "output": "o"})) == ("instruction", "o")
    assert needed_keys(SHAPE.validate_python({"kind": "preference"})) == ("chosen", "rejected")


def test_no_record_is_met_with_another_error() -> None:
    """Values of every type wherever a shape looks."""
    words = ["messages", "conversations", "text", "role", "content", "from", "value", "prompt", "chosen", "rejected", "tools"]
    words += ["instruction", "input", "output", "tool_calls", "function", "arguments", "name", "type", "system", "id"]
    leaves = [None, True, 0, 1.5, "", "user", "assistant", "bot", "gpt", "human", "text", "[]", "{", "<think>x</think>a", []]

    def value(draw: random.Random, depth: int) -> Any:
        kind = draw.random()
        if depth == 4 or kind < 0.4:
            return draw.choice(leaves)
        if kind < 0.6:
            return [value(draw, depth + 1) for _ in range(draw.randrange(4))]
        return {draw.choice(words): value(draw, depth + 1) for _ in range(draw.randrange(6))}

    kinds = ("text", "messages", "sharegpt", "alpaca", "preference")
    fits = 0
    for seed in range(4000):
        draw = random.Random(seed)
        shape = SHAPE.validate_python({"kind": kinds[seed % 5]})
        record = {key: value(draw, 1) for key in needed_keys(shape)} | {draw.choice(words): value(draw, 1)}
        try:
            found = document(shape, record, "f")
        except BadRecordError:
            continue
        fits += 1
        if isinstance(found.content, Dialogue):
            assert found.content.messages and all(isinstance(message["content"], str) for message in found.content.messages)
    assert fits > 100
