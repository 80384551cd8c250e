"""``outgrow top``: a run as it is now, in a terminal; from node agents where they answer, else from its own records."""

from __future__ import annotations

from outgrow.monitoring.top.screen import draw
from outgrow.monitoring.top.watch import Watch

__all__ = ["Watch", "draw"]
