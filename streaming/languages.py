"""The language of a text, by py3langid: naive Bayes on byte n-grams, 140 languages, a model of arrays alone (no pickle)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

FORMAT = 1
"""Counts up when the same text would give another language."""
FIRST_CHARS = 2000
"""As much of a text is looked at, from its beginning; some 0.3 to 0.6 ms a text."""

_LEAST_LETTERS = 12
"""Texts with fewer letters are not judged: 'Hello' alone looks Breton."""
_LEAST_CONFIDENCE = 0.3
"""Of a text in one language that is long enough to tell, the confidence is above 0.9."""
_TWO_LETTERS = {
    "arz": "ar", "ary": "ar", "yue": "zh", "wuu": "zh", "fuv": "ff", "gug": "gn", "kik": "ki", "sdh": "ku", "uzs": "uz",
}  # fmt: skip
"""Codes of ISO 639-3 that are part of a language of ISO 639-1; others of three letters have none."""


def detect(texts: Sequence[str]) -> list[str]:
    """ISO 639-1 code of each text (``ru``, ``en``), "" where it is too short or in doubt, or its language has no such code.

    The same text gives the same language on every machine, but where the confidence is within rounding of its limit. The
    model takes 0.8 s and 130 MB, once a process.
    """
    return [_language(text[:FIRST_CHARS]) for text in texts]


def _language(text: str) -> str:
    if sum(map(str.isalpha, text)) < _LEAST_LETTERS:
        return ""
    code, confidence = _identifier().classify(text)
    if confidence < _LEAST_CONFIDENCE:
        return ""
    return code if len(code) == 2 else _TWO_LETTERS.get(code, "")


@cache
def _identifier() -> Any:
    """An identifier of our own: the package's global one gives scores, and may be narrowed to some languages by others."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # type: ignore[import-untyped]

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
