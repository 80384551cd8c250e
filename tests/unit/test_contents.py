"""What the build does with contents before they are rendered: texts found, cleaned, joined and digested."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from outgrow.streaming.contents import clean_content, content_digest, held_out, is_empty, side_digest, texts_of
from outgrow.streaming.sources.document import Content, Dialogue, Message, PreferencePair


def said(role: str, content: str, **more: object) -> Message:
    return {"role": role, "content": content, **more}


TALK = Dialogue(
    messages=(said("user", "q e\u0301"), said("assistant", "a e\u0301e\u0301", reasoning_content="r e\u0301")),
    tools=({"type": "function", "function": {"name": "e\u0301"}},),
)
PAIR = PreferencePair(prompt=TALK, chosen=(said("assistant", "c"),), rejected=(said("assistant", "d e\u0301"),))


def shout(text: str) -> tuple[str, tuple[int, ...]]:
    """Two steps: accents joined, and nothing."""
    return text.replace("e\u0301", "é"), (text.count("e\u0301"), 0)


def test_texts_come_in_the_order_of_reading() -> None:
    assert texts_of("x") == ["x"]
    assert texts_of(TALK) == ["q e\u0301", "r e\u0301", "a e\u0301e\u0301"]
    assert texts_of(PAIR) == ["q e\u0301", "r e\u0301", "a e\u0301e\u0301", "c", "d e\u0301"]
    assert texts_of(np.array([1, 2])) == []


@pytest.mark.parametrize(("content", "changes"), [("e\u0301", 1), (TALK, 4), (PAIR, 5), (np.array([1, 2]), 0)])
def test_every_text_is_cleaned_and_nothing_else(content: Content, changes: int) -> None:
    cleaned, made = clean_content(content, shout, 2)
    assert made == (changes, 0)
    assert texts_of(cleaned) == [shout(text)[0] for text in texts_of(content)]
    if isinstance(cleaned, Dialogue):
        assert cleaned.tools == TALK.tools and [m["role"] for m in cleaned.messages] == ["user", "assistant"]
    assert texts_of(TALK)[0] == "q e\u0301", "what was given is not changed"


def test_equal_contents_have_equal_digests() -> None:
    long = "Ж" * 300_000
    assert content_digest(long) == hashlib.sha256(long.encode()).digest()
    assert content_digest(np.array([1, 2])) == hashlib.sha256(np.array([1, 2], "<i8").tobytes()).digest()
    again = Dialogue(messages=tuple(json.loads(json.dumps(TALK.messages))), tools=tuple(json.loads(json.dumps(TALK.tools))))
    assert content_digest(again) == content_digest(TALK)
    others: list[Content] = [
        TALK,
        Dialogue(messages=TALK.messages),
        Dialogue(messages=TALK.messages[:1], tools=TALK.tools),
        PAIR,
        PreferencePair(prompt=TALK, chosen=PAIR.rejected, rejected=PAIR.chosen),
    ]
    assert len({content_digest(content) for content in others}) == len(others)


def test_all_answers_to_one_prompt_are_on_one_side() -> None:
    def side(content: Content) -> bool:
        return held_out(side_digest(content, content_digest(content)), 0.5)

    for number in range(50):
        prompt = Dialogue(messages=(said("user", str(number)),))
        sides = {side(PreferencePair(prompt=prompt, chosen=(said("assistant", a),), rejected=PAIR.rejected)) for a in "xyz"}
        assert len(sides) == 1
    share = sum(side(str(number)) for number in range(4000)) / 4000
    assert abs(share - 0.5) < 0.03
    assert not held_out(bytes(32), 0.0)


def test_a_dialogue_is_empty_where_nobody_says_or_calls_anything() -> None:
    nothing, call = said("assistant", ""), said("assistant", "", tool_calls=[{"function": {"name": "f"}}])
    assert is_empty("") and is_empty(np.array([], np.int64)) and is_empty(Dialogue(messages=(nothing, nothing)))
    assert not is_empty("x") and not is_empty(Dialogue(messages=(nothing, call)))
    assert is_empty(PreferencePair(prompt=TALK, chosen=(nothing,), rejected=(nothing,)))
    assert not is_empty(PAIR)
