"""The one way in which a dialogue fails to become tokens."""

from __future__ import annotations


class UnrenderableError(ValueError):
    """Says in plain words why a template does not write a dialogue, or why it is not certain which tokens it makes of it."""


class LeftOutError(UnrenderableError):
    """Says what of a dialogue a template leaves out, be it in doubt otherwise or not."""
