"""The one live line of a run: step, loss, tokens/s, data wait, time left. Plain lines where there is no terminal."""

from __future__ import annotations

import shutil
import sys
from typing import TextIO

from outgrow.contracts import StepRecord


class LiveLine:
    """Draws records as they come. Steps overwrite one line on a terminal; validations, checkpoints and restarts stay."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._terminal = self._stream.isatty()
        self._width = 0

    def show(self, record: StepRecord) -> None:
        text = describe(record)
        if self._terminal and record.kind == "step":
            # A line that wraps could not be drawn over.
            text = text[: shutil.get_terminal_size().columns - 1]
            self._stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self._break()
            self._stream.write(text + "\n")
        self._stream.flush()

    def say(self, text: str) -> None:
        """A line of its own, below the live one."""
        self._break()
        self._stream.write(text + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._break()
        self._stream.flush()

    def _break(self) -> None:
        if self._width:
            self._stream.write("\n")
            self._width = 0


def describe(record: StepRecord) -> str:
    """One line for a person."""
    at = f"step {record.step}/{record.steps}"
    if record.kind == "start":
        lost = len(record.detail.get("lost_shards", ()))
        without = f", without the rows of {lost} lost shard(s)" if lost else ""
        return f"{at}  {'resumed' if record.step else 'started'} on {record.detail.get('world', 1)} rank(s){without}"
    if record.kind == "validation":
        streams = record.detail.get("streams", {})
        parts = [f"{name} {loss:.4f}" for name, loss in streams.items()] if len(streams) > 1 else []
        return f"{at}  validation loss {_number(record.loss)}" + (f"  ({', '.join(parts)})" if parts else "")
    if record.kind == "roll_back":
        return f"{at}  gone back to here, learning rate x {record.detail.get('rate', 1):g}: {record.detail.get('why', '')}"
    if record.kind == "checkpoint":
        failed = record.detail.get("error")
        return f"{at}  checkpoint " + (f"FAILED: {failed}" if failed else "committed")
    if record.kind == "end":
        early = record.detail.get("ended")
        loss = f", validation loss {_number(record.loss)}" if record.loss is not None else ""
        return f"{at}  ended early{loss}: {early}" if early else f"{at}  finished{loss}"
    return "  ".join(
        [
            at,
            f"loss {_number(record.loss)}",
            f"lr {record.learning_rate or 0:.2e}",
            f"{record.tokens_per_s or 0:,.0f} tokens/s",
            f"data wait {100 * (record.data_wait_s or 0) / record.step_s:.1f}%" if record.step_s else "data wait -",
            f"ETA {duration((record.steps - record.step) * (record.step_s or 0))}",
        ]
    )


def duration(seconds: float) -> str:
    """``1h02m``, ``3m05s`` or ``7s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
