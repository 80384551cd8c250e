"""The language of texts, told without trusting a pickle."""

from __future__ import annotations

import lzma
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from outgrow.streaming.languages import detect

SENTENCES = {
    "ru": "Мороз и солнце; день чудесный! Ещё ты дремлешь, друг прелестный.",
    "uk": "Реве та стогне Дніпр широкий, сердитий вітер завива, додолу верби гне високі.",
    "be": "Мой родны кут, як ты мне мілы, забыць цябе не маю сілы.",
    "en": "It was the best of times, it was the worst of times, it was the age of wisdom.",
    "de": "Es war einmal eine kleine süße Dirne, die hatte jedermann lieb.",
    "fr": "Longtemps, je me suis couché de bonne heure, et parfois mes yeux se fermaient.",
    "es": "En un lugar de la Mancha, de cuyo nombre no quiero acordarme.",
    "ja": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "zh": "道可道，非常道。名可名，非常名。无名天地之始；有名万物之母。",
    "ar": "كان يا ما كان في قديم الزمان ملك يحكم بلادا واسعة.",
}


def test_languages_are_told_apart() -> None:
    assert detect(list(SENTENCES.values())) == list(SENTENCES)


def test_what_is_too_short_or_says_nothing_has_no_language() -> None:
    assert detect(["", "Да.", "Hello", "123 456 789 000 111 222", "!" * 500, "\n\n\n"]) == [""] * 6


def test_the_beginning_counts_and_more_is_not_looked_at() -> None:
    start = (SENTENCES["ru"] + " ") * 40
    assert len(start) > 2000
    assert detect([start + SENTENCES["en"] * 1000]) == ["ru"]


def test_every_code_has_two_letters() -> None:
    """The column of the document tables has room for two."""
    assert all(len(code) in (0, 2) for code in detect([text[i:] for text in SENTENCES.values() for i in range(0, 40, 5)]))
    # Cantonese counts as Chinese.
    assert detect(["呢個係廣東話嘅句子，你哋識唔識睇？我哋今日去邊度食飯呀？"]) == ["zh"]


def test_the_same_text_has_the_same_language_whatever_was_asked_before() -> None:
    texts = list(SENTENCES.values())
    assert detect(texts[::-1])[::-1] == [detect([text])[0] for text in texts]


def test_the_model_holds_no_pickle() -> None:
    package = pytest.importorskip("py3langid")
    packed = (Path(package.__file__).parent / "data/model.npz.xz").read_bytes()
    with zipfile.ZipFile(BytesIO(lzma.decompress(packed))) as archive:
        for name in archive.namelist():
            head = archive.read(name)[:256]
            assert head.startswith(b"\x93NUMPY") and b"'|O'" not in head, name  # '|O' arrays are pickles
