"""Chat templates: where they come from, what is learned of those of others, and what is refused rather than guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from slow_render import Setting, chat_stream, make_tokenizer, slow_render

from outgrow.errors import DataError
from outgrow.streaming.render import Rendered, Renderer
from outgrow.streaming.render.chat_template import ChatTemplate
from outgrow.streaming.render.unrenderable import UnrenderableError
from outgrow.streaming.sources.document import Dialogue, Document
from outgrow.streaming.tokenizer import TextTokenizer, copy_tokenizer
from outgrow.streaming.tokenizer_template import own_template

USER, ANSWER, SYSTEM = ({"role": role, "content": role[0].upper()} for role in ("user", "assistant", "system"))
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}],
}
RESULT = {"role": "tool", "content": "2"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
OWN = {"kind": "tokenizer"}
FILE = {"kind": "file", "path": "template"}
BODY = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer("bytes", tmp_path_factory.mktemp("bare") / "tokenizer")


class Workshop:
    """Makes settings whose template is a file with the given text."""

    def __init__(self, bare: Path, root: Path) -> None:
        self.bare, self.root, self.made = bare, root, 0

    def folder(self) -> Path:
        """A copy of the tokenizer."""
        self.made += 1
        return Path(shutil.copytree(self.bare, self.root / str(self.made) / "tokenizer"))

    def __call__(self, text: str, *, tokens: str = "<|im_start|> <|im_end|>", **chat: Any) -> Setting:
        folder = self.folder()
        path = folder.parent / "template.jinja"
        path.write_text(f"{{#- special tokens: {tokens} -#}}\n{text}", encoding="utf-8")
        return Setting(folder, chat_stream(FILE, **chat), template=path)


@pytest.fixture
def workshop(bare: Path, tmp_path: Path) -> Workshop:
    return Workshop(bare, tmp_path)


def learned(setting: Setting, *messages: dict[str, Any], tools: Any = ()) -> str:
    """What is rendered, with what is learned in brackets."""
    content = Dialogue(messages=messages, tools=tuple(tools))
    (made,) = setting.renderer.encode([Document(content=content, source="here")])
    assert isinstance(made, Rendered) and made.weights is not None
    text, before = "", 0.0
    for token, weight in zip([*made.tokens.tolist(), None], [*made.weights.tolist(), 0.0], strict=True):
        text += "⟦" if weight and not before else "⟧" if before and not weight else ""
        text += setting.theirs.decode([token]) if token is not None else ""
        before = weight
    assert text.replace("⟦", "").replace("⟧", "") == setting.text(messages, tools)
    return text


# --- where templates come from ----------------------------------------------------------------------------------------


def test_the_tokenizers_own_template_wherever_it_lies(workshop: Workshop) -> None:
    texts = []
    for place in ("config", "file", "list", "folder"):
        folder = workshop.folder()
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if place == "config":
            config["chat_template"] = BODY + PROMPT
        elif place == "list":
            config["chat_template"] = [
                {"name": "default", "template": BODY + PROMPT},
                {"name": "tool_use", "template": "T" + BODY},
            ]
        else:
            (folder / "chat_template.jinja").write_text(BODY + PROMPT)
        if place == "folder":
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "tool_use.jinja").write_text("T" + BODY)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        setting = Setting(folder, chat_stream(OWN))
        texts.append(learned(setting, USER, ANSWER))
    assert set(texts) == {"<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n⟦A<|im_end|>⟧\n"}


def test_a_template_for_tools_is_chosen_as_transformers_chooses_it(workshop: Workshop) -> None:
    folder = workshop.folder()
    (folder / "chat_template.jinja").write_text("\n  " + BODY + PROMPT + "\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(
        "\n{{ tools | length }} tools\n\n" + BODY + PROMPT + "\n"
    )
    copied = folder.parent / "copy"
    copy_tokenizer(folder, copied)  # as a build does; one file, for an export takes no folders
    assert (copied / "chat_template.jinja").is_file() and not (copied / "additional_chat_templates").exists()
    original, single = Setting(folder, chat_stream(OWN)), Setting(copied, chat_stream(OWN))
    for tools in ((), TOOLS):
        assert single.text([USER, ANSWER], tools) == original.text([USER, ANSWER], tools)
        assert learned(single, USER, ANSWER, tools=tools) == learned(original, USER, ANSWER, tools=tools)


def test_a_tokenizer_without_a_usable_template_is_refused(workshop: Workshop) -> None:
    with pytest.raises(DataError, match=r"the tokenizer has no chat template(.|\n)*named, name: chatml"):
        Setting(workshop.folder(), chat_stream(OWN))
    folder = workshop.folder()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    with pytest.raises(DataError, match="there are chat templates rag, and none is called default"):
        own_template(folder)
    copy_tokenizer(folder, folder.parent / "copy")  # texts alone need no template


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"\xff{{", "not UTF-8"),
        (b"\n{% if %}", "no Jinja template: line 2"),
        (b"{% x %}", "unknown tag"),
    ],
)
def test_a_file_that_is_no_template_is_refused(workshop: Workshop, content: bytes | None, message: str) -> None:
    path = workshop.root / "t.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        Setting(workshop.folder(), chat_stream(FILE), template=path)


# --- templates of others ----------------------------------------------------------------------------------------------


def test_generation_blocks_say_what_answers_are(workshop: Workshop) -> None:
    setting = workshop(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}Well: {% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    )
    text = "<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nWell: ⟦{}<|im_end|>⟧\n"
    assert learned(setting, USER, ANSWER) == text.format("A")
    assert learned(setting, USER, {**ANSWER, "content": ""}, USER, ANSWER) == text.format("") + text.format("A")
    last = workshop(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}",
        answers="last",
    )
    assert learned(last, USER, ANSWER, USER, {**ANSWER, "content": "B"}) == "UA<|im_end|>U⟦B<|im_end|>⟧"


def test_thinking_that_a_template_drops_from_earlier_answers(workshop: Workshop) -> None:
    """As Qwen3 does; the prompt for an answer drops it as well, so what is learned is what the model writes."""
    setting = workshop(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
        "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}" + PROMPT,
        thinking_weight=0,
    )
    thought = {**ANSWER, "reasoning_content": "T"}
    assert learned(setting, USER, thought, USER, thought).split("<|im_start|>")[2::2] == [
        "assistant\n⟦A<|im_end|>⟧\n",
        "assistant\n<think>\nT\n</think>\n\n⟦A<|im_end|>⟧\n",
    ]
    assert learned(setting, USER, ANSWER).endswith("assistant\n⟦<think>\n\n</think>\n\nA<|im_end|>⟧\n")


def test_thinking_goes_into_the_content_where_a_template_does_not_write_it(workshop: Workshop) -> None:
    setting = workshop(BODY + PROMPT, thinking_weight=0)
    (made,) = setting.renderer.encode(
        [Document(content=Dialogue(messages=(USER, {**ANSWER, "reasoning_content": "T"})), source="x")]
    )
    ids, weights = slow_render(setting, "<|im_end|>", [USER, {**ANSWER, "content": "<think>\nT\n</think>\n\nA"}])
    assert isinstance(made, Rendered) and made.weights is not None
    assert made.tokens.tolist() == ids and sum(made.weights) == len("A") + 1 < sum(weights)


def test_what_ends_a_turn(workshop: Workshop) -> None:
    at_the_end = workshop(BODY + "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}")
    assert learned(at_the_end, USER, ANSWER).endswith("⟦A<|im_end|>⟧\n<|endoftext|>")  # the first token, as in every turn
    next_role = workshop("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", tokens="<|user|> <|assistant|>")
    assert learned(next_role, USER, ANSWER, USER, ANSWER) == "<|user|>U⟦<|assistant|>A<|user|>⟧U⟦<|assistant|>A⟧"
    no_token = workshop("{% for m in messages %}{{ m.role }}: {{ m.content }} ###\n{% endfor %}", tokens="")
    assert learned(no_token, USER, ANSWER, USER) == "user: U ###\n⟦assistant: A ###⟧\nuser: U ###\n"
    calls = workshop(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}<|end_call|>{% endfor %}{% if m.tool_calls %}<|end_calls|>{% endif %}<|end|>"
        "{% endfor %}",
        tokens="<|user|> <|assistant|> <|tool|> <|call|> <|end_call|> <|end_calls|> <|end|>",
    )
    called = '<|user|>U<|end|>⟦<|assistant|><|call|>f {"x": "1"}<|end_call|><|end_calls|><|end|>⟧'
    assert learned(calls, USER, CALL, RESULT, ANSWER) == called + "<|tool|>2<|end|>⟦<|assistant|>A<|end|>⟧"


def test_a_template_may_trim_and_look_into_what_messages_hold(workshop: Workshop) -> None:
    looking = workshop(
        "{% for m in messages %}<|im_start|>{{ m.role }}{{ ' asks' if '?' in m.content else '' }}\n"
        "{{ m.content.strip().replace('b', 'c') }}<|im_end|>\n{% endfor %}"
    )
    messages = [{**USER, "content": " b? \n"}, {**ANSWER, "content": "\tabba "}]
    assert learned(looking, *messages) == "<|im_start|>user asks\nc?<|im_end|>\n⟦<|im_start|>assistant\nacca<|im_end|>⟧\n"
    short = workshop("{% for m in messages %}{{ m.content[:3] if m.role == 'user' else m.content }}<|im_end|>{% endfor %}")
    assert learned(short, {**USER, "content": "abcde"}, ANSWER) == "abc<|im_end|>⟦A<|im_end|>⟧"  # the answer is in no doubt


def test_swallowed_white_space_belongs_to_its_token(workshop: Workshop) -> None:
    setting = workshop("{% for m in messages %}{{ m.content }} <|im_end|> \n{% endfor %}", tokens="<|im_end|>")
    path = setting.folder / "tokenizer.json"
    form = json.loads(path.read_text())
    for token in form["added_tokens"]:
        token |= {"lstrip": token["content"] == "<|im_end|>", "rstrip": token["content"] == "<|im_end|>"}
    path.write_text(json.dumps(form))
    again = Setting(setting.folder, chat_stream(FILE), template=setting.folder.parent / "template.jinja")
    messages = [{**USER, "content": "  U "}, {**ANSWER, "content": " A\n"}, {**USER, "content": "\n"}]
    (made,) = again.renderer.encode([Document(content=Dialogue(messages=tuple(messages)), source="x")])
    assert made.tokens.tolist() == again.theirs(again.text(messages), add_special_tokens=False)["input_ids"]  # type: ignore[union-attr]


# --- what is refused --------------------------------------------------------------------------------------------------

NOT_THE_PROMPT = BODY + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ raise_exception('No!') }}", [USER, ANSWER], "the chat template refuses it: No!"),
        ("{% if false %}x{% endif %}", [USER, ANSWER], "writes nothing for it"),
        ("{{ messages[9].content }}", [USER, ANSWER], "refuses it: .*has no (element|object)"),
        ("{{ bos_token }}" + BODY, [USER, ANSWER], "it writes bos_token, which the tokenizer does not have"),
        ("{{ ''.__class__.__mro__ }}", [USER, ANSWER], "refuses it: access to attribute '__class__'"),
        ("{{ messages.append(1) }}", [USER, ANSWER], "access to attribute 'append' of 'list' object is unsafe"),
        ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}", [USER], "writes more than 1,000,... characters"),
        (NOT_THE_PROMPT, [USER, ANSWER], r"prompt for message 2 \(assistant\) is not how it writes .* by generation blocks"),
        (
            "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}",
            [SYSTEM, USER],
            "leaves out .* 1 ",
        ),
        (BODY, [USER, CALL, ANSWER], r"leaves out what message 2 \(assistant\) holds"),
        (
            "{% for m in messages %}{{ m.content[:3] }}{% endfor %}",
            [USER, {**ANSWER, "content": "abcd"}],
            "cuts up what a message",
        ),
        (
            "{% for m in messages %}{{ m.content | length }} {{ m.content }}{% endfor %}",
            [USER, ANSWER],
            "looks into what messages hold",
        ),
        ("{% for m in messages %}{{ m.content }}{{ loop.last }}{% endfor %}", [USER, ANSWER], "prompt for message 2"),
    ],
)
def test_what_is_not_certain_is_refused(
    workshop: Workshop, template: str, messages: list[dict[str, Any]], message: str
) -> None:
    setting = workshop(template)
    with pytest.raises(DataError, match=rf"here: .*{message}"):
        setting.renderer.encode([Document(content=Dialogue(messages=tuple(messages)), source="here")])


def test_tools_that_a_template_does_not_write_are_refused(workshop: Workshop) -> None:
    setting = workshop(BODY + PROMPT)
    with pytest.raises(DataError, match="leaves out the functions that may be called"):
        learned(setting, USER, ANSWER, tools=TOOLS)


def test_the_last_answer_may_be_certain_where_others_are_not(workshop: Workshop) -> None:
    """Tools stand before the last question, so an earlier prompt was another text."""
    text = (
        "{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
        "{% if m == users[-1] %}{{ tools | tojson }}{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    )
    dialogue = [USER, ANSWER, {**USER, "content": "V"}, ANSWER]
    with pytest.raises(DataError, match="prompt for message 2"):
        learned(workshop(text), *dialogue, tools=TOOLS)
    assert learned(workshop(text, answers="last"), *dialogue, tools=TOOLS).endswith("⟦<|im_start|>assistant\nA<|im_end|>⟧")


def test_the_day_is_that_of_the_recipe(workshop: Workshop) -> None:
    setting = workshop("{{ strftime_now('%d %b %Y') }}" + BODY, date="2001-02-03")
    (made,) = setting.renderer.encode([Document(content=Dialogue(messages=(USER,)), source="x")])
    assert setting.tokenizer.decode(made.tokens).startswith("03 Feb 2001<|im_start|>")  # type: ignore[union-attr]


def test_a_special_token_that_is_found_in_some_places_alone_is_refused(workshop: Workshop) -> None:
    """``normalized`` beside a normalizer that changes what stands before it, as old Llama tokenizers have it."""
    folder = workshop.folder()
    path = folder / "tokenizer.json"
    form = json.loads(path.read_text())
    form["normalizer"] = {"type": "Prepend", "prepend": "_"}
    form["added_tokens"][0]["normalized"] = True
    path.write_text(json.dumps(form))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    with pytest.raises(DataError, match=r"finds in some places alone; set \"normalized\": false"):
        learned(Setting(folder, chat_stream(OWN)), USER, ANSWER)


def test_a_template_runs_with_the_filters_of_transformers() -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m | tojson }}{{ tools }}{{ no }}{% endfor %}",
        {"eos_token": "</s>"},
        "2024-01-01",
    )
    assert template.render([{"a": "ё<&'"}, {}], [], num_chars=1) == '{"a": "ё<&\'"}None'
    with pytest.raises(UnrenderableError, match="ZeroDivisionError"):
        ChatTemplate("{{ 1 / 0 }}", {}, "2024-01-01").render([], [], num_chars=1)


def test_a_tokenizer_without_the_tag_is_refused(workshop: Workshop) -> None:
    setting = workshop(BODY)
    tagged = Setting(workshop.folder(), chat_stream("chatml", tag="<TAG>"))
    with pytest.raises(DataError, match="the tokenizer has no token <TAG>"):
        Renderer(TextTokenizer(setting.folder), tagged.stream, None)
