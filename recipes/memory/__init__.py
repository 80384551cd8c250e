"""Forecasts of memory: of devices, nodes and their fastest disks. Pure."""

from outgrow.recipes.memory.counts import count, state_bytes
from outgrow.recipes.memory.forecast import forecast

__all__ = ["count", "forecast", "state_bytes"]
