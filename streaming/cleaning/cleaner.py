"""The steps of a stream, one after the other."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from outgrow.errors import DataError
from outgrow.recipes.schema.streams import (
    CleanStep,
    ControlCharacters,
    CustomClean,
    FillerWords,
    Hyphenation,
    LineJoins,
    LookAlikes,
    Nfc,
    TimeCodes,
)
from outgrow.streaming.cleaning.characters import clear_controls, compose, unify_look_alikes
from outgrow.streaming.cleaning.lines import join_divided_words, join_lines
from outgrow.streaming.cleaning.speech import drop_time_codes, filler_dropper

Step: TypeAlias = Callable[[str], tuple[str, int]]
"""The cleaned text, and how many changes were made."""


class Cleaner:
    """The steps of a stream in the order in which the recipe names them."""

    def __init__(self, steps: Sequence[CleanStep]) -> None:
        """Raises ``DataError`` where a custom step cannot be imported."""
        self._steps = [_step(step) for step in steps]

    def __call__(self, text: str) -> tuple[str, tuple[int, ...]]:
        """The cleaned text, and how many changes each step made. Raises ``DataError`` where a custom step fails."""
        counts = []
        for step in self._steps:
            text, count = step(text)
            counts.append(count)
        return text, tuple(counts)


def _step(step: CleanStep) -> Step:
    match step:
        case Nfc():
            return compose
        case ControlCharacters():
            return clear_controls
        case Hyphenation():
            return join_divided_words
        case LineJoins():
            return join_lines
        case FillerWords():
            return filler_dropper(step.words)
        case TimeCodes():
            return drop_time_codes
        case LookAlikes():
            return unify_look_alikes
        case CustomClean():
            return _custom(step)


def _custom(step: CustomClean) -> Step:
    """A function of the user's; a text that it changes counts as one change."""
    module, _, name = step.factory.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except Exception as error:  # a module may raise anything
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{step.factory}: it cannot be imported: {reason}", hint="install or correct its package") from error

    def clean(text: str) -> tuple[str, int]:
        try:
            made = function(text, **step.options)
        except Exception as error:  # and so may the function
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{step.factory}: {reason}", hint="correct it, or the options that it is given") from error
        if not isinstance(made, str):
            raise DataError(f"{step.factory} returned {type(made).__name__}; it must return the cleaned text")
        return made, int(made != text)

    return clean
