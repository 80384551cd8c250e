"""The families that tests of models go through. Import it before transformers: it makes transformers' models importable."""

from __future__ import annotations

from outgrow.torchvision import ensure_importable

ensure_importable()

from outgrow.trainers.models.families import TESTED  # noqa: E402

FAMILIES = tuple(TESTED)
