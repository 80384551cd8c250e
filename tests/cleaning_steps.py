"""Cleaning steps of a user's own, for recipes of tests."""

from __future__ import annotations


def without_x(text: str) -> str:
    return text.replace("x", "")
