"""Rendering: tokens and loss weights of dialogues against the slow twin, and what is refused rather than guessed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slow_render import ENDS, KINDS, Setting, chat_stream, make_tokenizer, slow_render

from outgrow.errors import DataError
from outgrow.streaming.render import Rendered, Renderer
from outgrow.streaming.sources.document import Dialogue, Document, Dropped, PreferencePair

Messages = list[dict[str, Any]]


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"id": "abc123def", "type": "function", "function": {"name": name, "arguments": arguments}}


TOOLS = ({"type": "function", "function": {"name": "get", "description": "It's «get»", "parameters": {"type": "object"}}},)
DIALOGUES: dict[str, Messages] = {
    "one turn": [user("Hello"), assistant("Hi there.")],
    "many turns": [user("One"), assistant("Two"), user("Three"), assistant("Four"), user("Five"), assistant("Six")],
    "system": [system("Be kind."), user("Hello"), assistant("Hi.")],
    "thinking": [user("2+2?"), assistant("4", reasoning_content="Two and two.\nFour."), user("3+3?"), assistant("6")],
    "thinking alone": [user("2+2?"), assistant("", reasoning_content="Hm")],
    "white space": [system(" x\n"), user("\n\nHello \n"), assistant("  Hi\t\n\n"), user(" "), assistant("\n")],
    "empty": [user(""), assistant(""), user("Again"), assistant("")],
    "unicode": [
        user("Привет! 你好 🙂👩‍👩‍👧 e\u0301"),
        assistant("«Ёж» — да…\u00a0🙂"),
        user("ñ"),
        assistant("̈ combining first"),
    ],
    "two answers": [user("Say two things."), assistant("One."), assistant("Two.")],
    "two questions": [user("One."), user("Two."), assistant("Both.")],
    "no answer": [user("Hello"), assistant("Hi."), user("Bye")],
    "answer first": [assistant("Welcome!"), user("Hi"), assistant("How are you?")],
    "template words": [
        user("user\nassistant\n<think> [INST"),
        assistant("</s <|im_end| > bot\n<|"),
        user("assistant"),
        assistant("|>"),
    ],
    "code": [user("```py\nif x:\n    y()\n```"), assistant("{% raw %}{{ x }}{% endraw %}\n\n\n\ta\\n")],
}
WITH_TOOLS: dict[str, Messages] = {
    "one call": [
        user("?"),
        assistant("", tool_calls=[call("get", city="Париж")]),
        {"role": "tool", "content": "3"},
        assistant("3°"),
    ],
    "calls and words": [
        system("S"),
        user("Weather"),
        assistant("Let me see.", tool_calls=[call("get", a='x"y\n', b=[1, {"c": " d "}]), call("get")]),
        {"role": "tool", "content": '{"t": 3}', "tool_call_id": "abc123def"},
        {"role": "tool", "content": ""},
        assistant("Done.", reasoning_content="So."),
    ],
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: make_tokenizer(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def make(tokenizers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Settings by tokenizer and streams, each made once."""
    made: dict[str, Setting] = {}

    def get(kind: str, *streams: dict[str, Any], **sources: Path) -> Setting:
        key = repr((kind, streams))
        if key not in made:
            folder = tmp_path_factory.mktemp("setting") / "tokenizer"
            shutil.copytree(tokenizers[kind], folder)
            made[key] = Setting(folder, *streams, **sources)
        return made[key]

    return get


def render(setting: Setting, messages: Messages, tools: Any = ()) -> Rendered:
    document = Document(content=Dialogue(messages=tuple(messages), tools=tuple(tools)), source="test")
    (made,) = setting.renderer.encode([document])
    assert isinstance(made, Rendered)
    return made


def check(setting: Setting, end: str, messages: Messages, tools: Any = ()) -> Rendered:
    """The rendering, which is that of the slow twin."""
    made = render(setting, messages, tools)
    ids, weights = slow_render(setting, end, messages, tools)
    assert made.tokens.tolist() == ids
    assert made.weights is not None
    assert made.weights.tolist() == weights
    assert made.borders.dtype == np.int32 and (np.diff(made.borders) > 0).all()
    return made


def shown(setting: Setting, made: Rendered) -> str:
    """Tokens as text, with a ``[`` where learning begins and a ``]`` where it ends."""
    text, before = "", 0.0
    assert made.weights is not None
    for at, weight in enumerate([*made.weights.tolist(), 0.0]):
        text += "[" if weight and not before else "]" if before and not weight else ""
        text += setting.tokenizer.decode(made.tokens[at : at + 1]) if at < len(made.tokens) else ""
        before = weight
    return text


# --- against the slow twin --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENDS)
def test_dialogues_are_those_of_the_slow_twin(make: Any, kind: str, name: str) -> None:
    setting = make(kind, chat_stream(name, thinking_weight=0.25))
    for messages in DIALOGUES.values():
        check(setting, ENDS[name], messages)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in ENDS if name != "saiga"])
def test_dialogues_with_tools_are_those_of_the_slow_twin(make: Any, kind: str, name: str) -> None:
    setting = make(kind, chat_stream(name, thinking_weight=0.25))
    for messages in WITH_TOOLS.values():
        check(setting, ENDS[name], messages, TOOLS)


@pytest.mark.parametrize("name", ["chatml", "llama3", "saiga"])
@pytest.mark.parametrize(
    "chat", [{"roles": ["user", "assistant"]}, {"roles": ["system"]}, {"answers": "last", "thinking_weight": 0}]
)
def test_roles_and_last_answers_are_those_of_the_slow_twin(make: Any, name: str, chat: dict[str, Any]) -> None:
    setting = make("bytes", chat_stream(name, **chat))
    for messages in DIALOGUES.values():
        check(setting, ENDS[name], messages)


def test_a_message_whose_own_weight_is_0_is_not_learned(make: Any) -> None:
    setting = make("bytes", chat_stream("chatml"))
    question = {"role": "user", "content": "Why?"}
    messages = [
        question,
        {"role": "assistant", "content": "No.", "weight": 0},
        question,
        {"role": "assistant", "content": "Yes."},
    ]
    for talk in (messages, [{**message, "weight": 1} if "weight" not in message else message for message in messages]):
        learned = shown(setting, render(setting, talk))
        assert "[Yes.<|im_end|>]" in learned and learned.count("[") == 1


WORDS = [
    "Hello",
    " ",
    "\n",
    "Привет",
    "🙂",
    "<|im_",
    "<s",
    "|>",
    "user",
    "assistant\n",
    "[INST",
    "]",
    "{{ x }}",
    "12",
    ".",
    "</think",
    "\t",
    "é",
]
CONTENTS = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)
SPECIAL = ("<s>", "</s>", "[INST]", "</think>", "<think>")


@st.composite
def dialogues(draw: st.DrawFn) -> Messages:
    content = CONTENTS.filter(lambda text: not any(token in text for token in SPECIAL))
    messages: Messages = [system(draw(content))] if draw(st.booleans()) else []
    for role in draw(st.lists(st.sampled_from(["user", "assistant"]), min_size=1, max_size=5)):
        message = {"role": role, "content": draw(content)}
        if role == "assistant" and draw(st.integers(0, 3)) == 0:
            message["reasoning_content"] = draw(content)
        messages.append(message)
    return messages


@pytest.mark.parametrize(
    ("kind", "name"), [("bytes", "chatml"), ("first", "mistral"), ("always", "saiga"), ("first", "llama3")]
)
@given(messages=dialogues())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_dialogue_is_that_of_the_slow_twin(make: Any, kind: str, name: str, messages: Messages) -> None:
    if name == "mistral" and any(message["role"] == "user" for message in messages) is False:
        messages = [user("x"), *messages[messages[0]["role"] == "system" :]]  # it has no place for a system prompt alone
    check(make(kind, chat_stream(name, thinking_weight=0.5)), ENDS[name], messages)


# --- what data may spell ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ENDS)
def test_no_content_can_write_a_special_token(make: Any, kind: str, name: str) -> None:
    setting = make(kind, chat_stream(name))
    spelled = "".join(token.content for token in setting.tokenizer.added_tokens.values() if token.special)
    honest = [system("S"), user("U"), assistant("A", reasoning_content="R"), user("V"), assistant("B")]
    forged = [{key: value if key == "role" else value + spelled + "!" for key, value in message.items()} for message in honest]
    if name != "saiga":
        honest.append(assistant("", tool_calls=[call("f", x="y")]))
        forged.append(assistant("", tool_calls=[call("f", x="y" + spelled)]))
    special = {number for number, token in setting.tokenizer.added_tokens.items() if token.special and token.content != "<unk>"}
    tokens = [render(setting, messages).tokens.tolist() for messages in (honest, forged)]
    written, found = ([token for token in own if token in special] for own in tokens)
    assert found == written
    theirs = setting.theirs.decode(_ids(setting, setting.text(forged)))
    assert setting.tokenizer.decode(np.array(tokens[1])).replace(" ", "") == theirs.replace(
        " ", ""
    )  # no space before each token


def test_a_special_token_outside_of_what_messages_hold_is_refused(make: Any) -> None:
    setting = make("bytes", chat_stream("chatml"))
    with pytest.raises(DataError, match="spells the special token '<|im_end|>' outside of what messages hold"):
        render(setting, [{"role": "user<|im_end|>", "content": "x"}, assistant("y")])
    with pytest.raises(DataError, match="outside of what messages hold"):
        render(setting, [user("x"), assistant("", tool_calls=[call("f", **{"<|im_end|>": "y"})])])
    tool = {"type": "function", "function": {"name": "<|im_start|>"}}
    with pytest.raises(DataError, match="outside of what messages hold"):
        render(setting, [user("x"), assistant("y")], [tool])


# --- what is learned --------------------------------------------------------------------------------------------------


def test_what_is_learned_to_the_letter(make: Any) -> None:
    messages = [user("Q"), assistant("A", reasoning_content="R")]
    assert shown(make("bytes", chat_stream("chatml")), render(make("bytes", chat_stream("chatml")), messages)) == (
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n[<think>\nR\n</think>\n\nA<|im_end|>]\n"
    )
    no_thinking = make("bytes", chat_stream("chatml", thinking_weight=0))
    assert shown(no_thinking, render(no_thinking, messages)).endswith("assistant\n<think>\nR\n</think>\n\n[A<|im_end|>]\n")
    inline = [user("Q"), assistant("<think>\nR\n</think>\n\nA")]
    assert render(no_thinking, inline).weights.tolist() == render(no_thinking, messages).weights.tolist()  # type: ignore[union-attr]
    llama = make("bytes", chat_stream("llama3"))
    assert shown(llama, render(llama, messages[:1] + [assistant(" A ")])).endswith("<|end_header_id|>\n\n[A<|eot_id|>]")
    mistral = make("first", chat_stream("mistral"))
    assert shown(mistral, render(mistral, [user("Q"), assistant("A")])) == "<s>[INST] Q[/INST][ A</s>]"


def test_a_token_that_begins_in_the_prompt_belongs_to_it(make: Any) -> None:
    setting = make("bytes", chat_stream("chatml"))
    made = check(setting, ENDS["chatml"], [user("Q"), assistant("\n A")])
    texts = setting.tokenizer.token_texts()
    (at,) = [at for at, token in enumerate(made.tokens.tolist()) if texts[token] == "\n\n"]  # of the header and of the content
    assert made.weights is not None and made.weights[at : at + 2].tolist() == [0, 1]


def test_system_prompts_are_kept_dropped_or_added(make: Any) -> None:
    plain, own = [user("Q"), assistant("A")], [system("S"), user("Q"), assistant("A")]
    texts = {}
    for name, chat in {
        "keep": {},
        "drop": {"system": "drop"},
        "add": {"add_system": "T"},
        "both": {"system": "drop", "add_system": "T"},
    }.items():
        setting = make("bytes", chat_stream("saiga", **chat))
        texts[name] = [setting.tokenizer.decode(render(setting, messages).tokens) for messages in (plain, own)]
    bare, with_own, with_added = ("<s>user\nQ</s>\n<s>bot\nA</s>\n", "<s>system\nS</s>\n", "<s>system\nT</s>\n")
    assert texts == {
        "keep": [bare, with_own + bare],
        "drop": [bare, bare],
        "add": [with_added + bare, with_own + bare],
        "both": [with_added + bare] * 2,
    }


def test_borders_are_where_turns_begin(make: Any) -> None:
    setting = make("bytes", chat_stream("chatml"))
    made = render(setting, DIALOGUES["many turns"])
    start = setting.tokenizer.token_id("<|im_start|>")
    assert made.borders.tolist() == [at for at, token in enumerate(made.tokens.tolist()) if token == start and at]
    alone = render(setting, [user("It begins. It ends.\nA line. ")])
    assert len(alone.borders) > 1  # of sentences, where there is one turn


def test_a_tag_begins_texts_and_dialogues(make: Any) -> None:
    for kind in KINDS:
        tagged, bare = (make(kind, chat_stream("chatml", tag=tag)) for tag in ("<SCENE>", ""))
        tag = tagged.tokenizer.token_id("<SCENE>")
        assert tag is not None
        made = render(tagged, DIALOGUES["many turns"])
        assert made.tokens.tolist() == _ids(tagged, "<SCENE>" + tagged.text(DIALOGUES["many turns"]))
        assert made.weights is not None and made.weights[0] == 0
        assert made.weights[1:].tolist() == render(bare, DIALOGUES["many turns"]).weights.tolist()  # type: ignore[union-attr]
        for text in ("Hello <SCENE> there.", ""):
            (document,) = tagged.renderer.encode([Document(content=text, source="t")])
            assert document.tokens.tolist()[0] == tag and document.tokens.tolist().count(tag) == 1
            assert document.weights is None and document.tokens[-1] == tagged.tokenizer.eos_token_id
        (document,) = tagged.renderer.encode([Document(content="Hello there.", source="t")])
        assert document.tokens.tolist()[:-1] == _ids(tagged, "<SCENE>Hello there.")


def _ids(setting: Setting, text: str) -> list[int]:
    return list(setting.theirs(text, add_special_tokens=False)["input_ids"])


# --- texts, token ids, pairs ------------------------------------------------------------------------------------------


def test_texts_and_token_ids_keep_their_order_among_dialogues(make: Any) -> None:
    setting = make("bytes", chat_stream("chatml"))
    dialogue = Dialogue(messages=(user("Q"), assistant("A")))
    contents = ["One.", np.array([5, 6]), dialogue, "<|im_start|>", np.array([7, setting.tokenizer.eos_token_id])]
    made = setting.renderer.encode([Document(content=content, source=str(n)) for n, content in enumerate(contents)])
    eos = setting.tokenizer.eos_token_id
    assert [setting.tokenizer.decode(item.tokens) for item in made[::3]] == [f"{text}<|endoftext|>" for text in contents[::3]]
    assert made[3].tokens.tolist().count(setting.tokenizer.token_id("<|im_start|>")) == 0
    assert made[1].tokens.tolist() == [5, 6, eos] and made[4].tokens.tolist() == [7, eos]
    assert made[2].tokens.tolist() == render(setting, list(dialogue.messages)).tokens.tolist()
    assert {item.tokens.dtype for item in made} == {np.dtype(np.uint16)}
    assert [item.weights is None for item in made] == [True, True, False, True, True]
    assert setting.renderer.encode([]) == []
    with pytest.raises(DataError, match="token ids from -1 to 3 are not of this tokenizer"):
        setting.renderer.encode([Document(content=np.array([3, -1]), source="x")])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tag", ["", "<PAIR>"])
def test_a_preference_pair_is_two_dialogues_whose_answers_are_learned(make: Any, kind: str, tag: str) -> None:
    pairs = make(kind, chat_stream("chatml", shape="preference", tag=tag))
    single = make(kind, chat_stream("chatml", tag=tag))
    prompt = [system("S"), user("Q1"), assistant("A1"), user("Q2")]
    answers = [[assistant("Better.", reasoning_content="R")], [assistant("Worse."), user("Why?"), assistant("So.")]]
    content = PreferencePair(prompt=Dialogue(messages=tuple(prompt)), chosen=tuple(answers[0]), rejected=tuple(answers[1]))
    (made,) = pairs.renderer.encode([Document(content=content, source="p")])
    halves = [render(single, prompt + answer) for answer in answers]
    assert made.tokens.tolist() == [token for half in halves for token in half.tokens.tolist()]
    (start, middle), (again, stop) = made.spans.tolist()
    assert (start, middle, again, stop) == (0, len(halves[0].tokens), len(halves[0].tokens), len(made.tokens))
    assert made.spans.dtype == np.int32 and made.borders.tolist() == [middle]
    prompt_tokens = len(_ids(single, tag + single.text(prompt)))
    for half, (begin, end) in zip(halves, made.spans.tolist(), strict=True):
        weights = made.weights[begin:end]
        assert not weights[:prompt_tokens].any() and weights[prompt_tokens:].any()
        assert weights[prompt_tokens:].tolist() == half.weights[prompt_tokens:].tolist()  # type: ignore[index]


# --- one way or the other ---------------------------------------------------------------------------------------------


@given(messages=dialogues())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_shape_worked_out_once_gives_what_each_dialogue_alone_gives(make: Any, messages: Messages) -> None:
    """A tool call makes a dialogue one that is worked out alone; here it stands last, and what precedes it must not change."""
    setting = make("bytes", chat_stream("chatml", thinking_weight=0.5))
    called = [*messages, user("x"), assistant("", tool_calls=[call("f")])]
    one, other = render(setting, messages), render(setting, called)
    assert other.tokens.tolist()[: len(one.tokens)] == one.tokens.tolist()
    assert one.weights is not None and other.weights is not None
    assert other.weights.tolist()[: len(one.tokens)] == one.weights.tolist()


def test_dialogues_of_one_batch_are_those_of_many(make: Any) -> None:
    setting = make("bytes", chat_stream("chatml"))
    documents = [Document(content=Dialogue(messages=tuple(messages)), source=name) for name, messages in DIALOGUES.items()]
    together = setting.renderer.encode(documents * 2)
    for made, document in zip(together, documents * 2, strict=True):
        (alone,) = setting.renderer.encode([document])
        assert made.tokens.tolist() == alone.tokens.tolist() and made.weights.tolist() == alone.weights.tolist()


def test_a_refused_dialogue_stops_is_dropped_or_kept_aside(make: Any) -> None:
    calls = Dialogue(messages=(user("Q"), assistant("", tool_calls=[call("f")])))
    documents = [
        Document(content=calls, source="d.jsonl#3"),
        Document(content=Dialogue(messages=(user("Q"),)), source="d.jsonl#4"),
    ]
    with pytest.raises(DataError, match="d.jsonl#3: the chat template refuses it: saiga has no calls of functions"):
        make("bytes", chat_stream("saiga")).renderer.encode(documents)
    for on_error in ("skip", "quarantine"):
        dropped, kept = make("bytes", chat_stream("saiga", on_error=on_error)).renderer.encode(documents)
        assert isinstance(dropped, Dropped) and isinstance(kept, Rendered)
        assert (dropped.source, dropped.reason) == ("d.jsonl#3", "unrenderable")
        assert ('"role": "user"' in dropped.content) == (on_error == "quarantine")


def test_a_dialogue_without_a_template_is_refused(make: Any) -> None:
    setting = make("bytes", chat_stream("chatml"))
    renderer = Renderer(setting.tokenizer, setting.stream, None)
    with pytest.raises(DataError, match="there is no chat template"):
        renderer.encode([Document(content=Dialogue(messages=(user("Q"),)), source="x")])
