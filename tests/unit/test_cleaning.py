"""Cleaning: each step on what it is for and on what it must leave alone, counted, repeatable, and linear on hostile text."""

from __future__ import annotations

import time
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from outgrow.errors import DataError
from outgrow.recipes.schema.streams import CleanStep
from outgrow.streaming.cleaning import Cleaner

STEPS = ("nfc", "control_characters", "hyphenation", "line_joins", "filler_words", "time_codes", "look_alikes")


def cleaner(*steps: str | dict[str, Any]) -> Cleaner:
    sections = [{"kind": step} if isinstance(step, str) else step for step in steps]
    return Cleaner([TypeAdapter(CleanStep).validate_python(section) for section in sections])


def clean(step: str | dict[str, Any], text: str) -> str:
    return cleaner(step)(text)[0]


# --- one step at a time -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_text", "cleaned", "changes"),
    [
        ("и\u0306 е\u0308 e\u0301", "й ё é", 3),
        ("ёлка, ель", "ёлка, ель", 0),
        ("a\u2000b", "a\u2002b", 1),
        ("a" + "\u0315\u0300" * 100, "a" + "\u0315\u0300" * 100, 0),
    ],
)
def test_nfc(given_text: str, cleaned: str, changes: int) -> None:
    assert cleaner("nfc")(given_text) == (cleaned, (changes,))


@pytest.mark.parametrize(
    ("given_text", "cleaned", "changes"),
    [
        ("a\r\nb\rc\x0cd\u2028e", "a\nb\nc\nd\ne", 4),
        ("1\xa0000\u202f000\u3000!", "1 000 000 !", 3),
        ("\ufeffnul\x00 zero\u200bwidth \u202eleft\u202c \x1b[0m", "nul zerowidth left [0m", 6),
        ("tab\tand\nline", "tab\tand\nline", 0),
        ("👨\u200d👩\u200d👧 نمی\u200cخواهم क्\u200dष ❤\ufe0f", "👨\u200d👩\u200d👧 نمی\u200cخواهم क्\u200dष ❤\ufe0f", 0),
        ("сло\u200dво wo\u200crd", "слово word", 2),
        ("soft\u00adhyphen", "soft\u00adhyphen", 0),
    ],
)
def test_control_characters(given_text: str, cleaned: str, changes: int) -> None:
    assert cleaner("control_characters")(given_text) == (cleaned, (changes,))


@pytest.mark.parametrize(
    ("given_text", "cleaned"),
    [
        ("перево-\nдчик", "переводчик"),
        ("inter-  \n   national", "international"),
        ("пе-\nре-\nход", "переход"),
        ("soft\u00ad\nware, со\u00adфт", "software, софт"),
        ("кто-то из-за Rhine-Main", "кто-то из-за Rhine-Main"),
        ("какой-\nто, что-\nнибудь, где-\nлибо", "какой-то, что-нибудь, где-либо"),
        ("кое-\nкто, всё-\nтаки, дай-\nка, смотрите-\nка", "кое-кто, всё-таки, дай-ка, смотрите-ка"),
        ("мес-\nто, руч-\nка, а-\nтаки, кое-\nчный, апте-\nка", "место, ручка, атаки, коечный, аптека"),
        ("из-\nза угла, из-\nпод земли", "из-за угла, из-под земли"),
        ("Петров-\nВодкин, Rhine-\nMain", "Петров-Водкин, Rhine-Main"),
        ("ДЛИН-\nНЫЙ", "ДЛИННЫЙ"),
        ("юго-западный ветер, юго-\nзападный", "юго-западный ветер, юго-западный"),
        ("Vor-\nund Nachteile", "Vor- und Nachteile"),
        ("пункт -\nслово, тире —\nслово, 5-\nлетний", "пункт -\nслово, тире —\nслово, 5-\nлетний"),
        ("конец-\n\nабзац", "конец-\n\nабзац"),
    ],
)
def test_hyphenation(given_text: str, cleaned: str) -> None:
    assert clean("hyphenation", given_text) == cleaned


WRAPPED = (
    "Это первая строка абзаца, которую разорвали по ширине\n"
    "страницы, и она продолжается на следующей строке, а за\n"
    "ней ещё одна.\n"
    "Новый абзац начинается здесь, потому что строка выше\n"
    "была короткой.\n"
    "\n"
    "— Так говорит один, и строка его полна до самого края\n"
    "— А так отвечает другой, и его строка столь же длинна\n"
    "    С отступа тоже начинается абзац, даже после полной\n"
)


def test_line_joins_keep_paragraphs() -> None:
    text, (joins,) = cleaner("line_joins")(WRAPPED)
    assert text.split("\n") == [
        "Это первая строка абзаца, которую разорвали по ширине "
        "страницы, и она продолжается на следующей строке, а за ней ещё одна.",
        "Новый абзац начинается здесь, потому что строка выше была короткой.",
        "",
        "— Так говорит один, и строка его полна до самого края",
        "— А так отвечает другой, и его строка столь же длинна",
        "    С отступа тоже начинается абзац, даже после полной",
        "",
    ]
    assert joins == 3


@pytest.mark.parametrize(
    "text",
    [
        "Мой дядя самых честных правил,\nКогда не в шутку занемог,\nОн уважать себя заставил\nИ лучше выдумать не мог.\n",
        "\n".join(["слово " * 100] * 5),
        "1. " + "пункт списка, который занимает всю строку целиком\n2. " * 5,
        "",
        "одна строка",
    ],
)
def test_verse_lists_and_text_without_broken_lines_keep_their_lines(text: str) -> None:
    assert clean("line_joins", text) == text


@pytest.mark.parametrize(
    ("given_text", "cleaned", "changes"),
    [
        ("Ну, э, я думаю", "Ну я думаю", 1),
        ("Э, я думаю, что м-м это так.", "Я думаю, что это так.", 2),
        ("Да. Э-э, нет. Um, yes.", "Да. Нет. Yes.", 2),
        ("— Э, да\n  ммм нет\nхм, uh", "— Да\n  нет\nхм", 3),
        ("Я не знаю, э... Может быть. Э... ну да, э… нет", "Я не знаю... Может быть. Ну да нет", 3),
        ("(э да) «Э, что?» э э э.", "(да) «Что?».", 5),
        (
            "5 м и 10 мм, М. Горький, Hmm! Эра, этот, МММ-банк, кое-э",
            "5 м и 10 мм, М. Горький, Hmm! Эра, этот, МММ-банк, кое-э",
            0,
        ),
        ("Эээ.", "Эээ.", 0),
    ],
)
def test_filler_words(given_text: str, cleaned: str, changes: int) -> None:
    assert cleaner("filler_words")(given_text) == (cleaned, (changes,))


def test_filler_words_of_ones_own() -> None:
    step = {"kind": "filler_words", "words": ["как бы", "you know"]}
    assert clean(step, "Он, как  бы, прав. You know, it is. какбы") == "Он прав. It is. какбы"
    assert clean({"kind": "filler_words", "words": []}, "э, да") == "э, да"


@pytest.mark.parametrize(
    ("given_text", "cleaned", "changes"),
    [
        ("[00:01:02.300] Привет [0:05] мир (1:02).", "Привет мир.", 3),
        ("00:01:02 --> 00:01:05\nтекст\n00:01:06,000 --> 00:01:09,500 align:start\nещё", "текст\nещё", 2),
        ("0:05\nПервое\n12:34\nВторое", "Первое\nВторое", 2),
        ("01:00:10 Начало\nслово 00:01:02 --> слово [0:01 - 0:05]\n", "Начало\nслово слово\n", 3),
        ("слово[0:01] слово [0:02], [0:03] [0:04]\n[0:05]  x", "слово слово,\nx", 5),
        ("Встреча в 10:30, счёт (2:1), Мф. 5:3, 12:00 обед", "Встреча в 10:30, счёт (2:1), Мф. 5:3, 12:00 обед", 0),
    ],
)
def test_time_codes(given_text: str, cleaned: str, changes: int) -> None:
    assert cleaner("time_codes")(given_text) == (cleaned, (changes,))


@pytest.mark.parametrize(
    ("given_text", "cleaned", "changes"),
    [
        ("Kиев Пpoeкт Moсква xорошо", "Киев Проект Москва хорошо", 4),
        ("сom аpple Рython", "com apple Python", 3),
        ("СМC ООO", "СМС ООО", 2),
        ("Украiна ёж Ëж", "Украіна ёж Ёж", 2),
        ("iPhoneами WiFiшный Ав IT-шник COVID-19 ещё елка café", "iPhoneами WiFiшный Ав IT-шник COVID-19 ещё елка café", 0),
    ],
)
def test_look_alikes(given_text: str, cleaned: str, changes: int) -> None:
    assert cleaner("look_alikes")(given_text) == (cleaned, (changes,))


# --- steps in a row ---------------------------------------------------------------------------------------------------


def test_steps_go_in_order_and_each_is_counted() -> None:
    text = "сло\u00ad\r\nво и\u0306\x00"
    assert cleaner("control_characters", "hyphenation", "nfc")(text) == ("слово й", (2, 1, 1))
    assert cleaner()(text) == (text, ())


def shout(text: str, *, mark: str = "!") -> str:
    return text.upper() + mark


def fail(text: str) -> str:
    raise ZeroDivisionError(text)


def test_a_step_of_ones_own() -> None:
    own = {"kind": "custom", "factory": f"{__name__}:shout", "options": {"mark": "?"}}
    assert cleaner("nfc", own)("да") == ("ДА?", (0, 1))
    with pytest.raises(DataError, match="fail: ZeroDivisionError: да"):
        clean({"kind": "custom", "factory": f"{__name__}:fail"}, "да")
    with pytest.raises(DataError, match="returned int; it must return the cleaned text"):
        clean({"kind": "custom", "factory": "builtins:len"}, "да")
    with pytest.raises(DataError, match="cannot be imported"):
        cleaner({"kind": "custom", "factory": "no_such_module:f"})


ORDINARY = st.lists(
    st.sampled_from(
        [
            "слово",
            "кто",
            "то",
            "-",
            "-\n",
            "\u00ad",
            "\n",
            " ",
            ", ",
            ". ",
            "э",
            "М",
            "Uh",
            "5 м",
            "[0:01]",
            "0:02\n",
            "1:02:03",
            "—",
        ]
        + ["сom", "Aх", "и\u0306", "\r\n", "\u200b", "\xa0", "…", "?", "«", "»", "ка", "дай", "Main", "x", "и"]
    ),
    max_size=30,
).map("".join)
ONCE = ("nfc", "control_characters", "hyphenation", "filler_words", "look_alikes")


@pytest.mark.parametrize("step", ONCE)
@given(text=ORDINARY)
@settings(max_examples=30, deadline=None)
def test_a_second_time_changes_nothing(step: str, text: str) -> None:
    own = cleaner(step)
    cleaned, (changes,) = own(text)
    assert (changes > 0) == (cleaned != text)
    assert own(cleaned) == (cleaned, (0,))


@given(text=ORDINARY)
@settings(max_examples=30, deadline=None)
def test_letters_are_neither_lost_nor_made(text: str) -> None:
    """But for fillers and look-alikes, what is no white space, hyphen or control stays, in order."""

    def letters(value: str) -> str:
        return "".join(char for char in unicodedata.normalize("NFC", value) if char.isalpha())

    assert letters(cleaner("nfc", "control_characters", "hyphenation", "line_joins")(text)[0]) == letters(text)


HOSTILE = [
    "a",
    "а",
    " ",
    "\n",
    "-",
    "a-\n",
    "аa",
    "э-",
    "э ",
    "э,",
    "1:",
    "[0:01",
    "00:01:02 -->",
    "\u0315\u0300",
    "- ",
    "\u200d",
]
HOSTILE += ["x" * 60 + "\n", "0", "(", "\r", " 0:01", "а-\nто ", "э...  ", "\t"]


@pytest.mark.parametrize("step", STEPS)
def test_hostile_text_takes_linear_time(step: str) -> None:
    """100,000 characters each: what takes time with its square would take minutes."""
    own = cleaner(step)
    for unit in HOSTILE:
        text = (unit * 100_000)[:100_000] + "я"
        before = time.process_time()
        own(text)
        assert time.process_time() - before < 5, repr(unit)
