"""Cleaning of texts in named, ordered, counted steps.

Every step takes time in proportion to the text, whatever it holds, and all but ``line_joins`` find nothing more to do in what
they made of ordinary text.
"""

from __future__ import annotations

from outgrow.streaming.cleaning.cleaner import Cleaner

__all__ = ["Cleaner"]
