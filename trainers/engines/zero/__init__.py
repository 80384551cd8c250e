"""DeepSpeed's ZeRO behind the seam of engines. DeepSpeed, which takes seconds to import, is imported when an engine is made."""

from __future__ import annotations

from outgrow.trainers.engines.zero.engine import ZeroEngine

__all__ = ["ZeroEngine"]
