"""What the device's allocator did in a window of steps, as a page that loads nothing: bytes over time, and who held them at the
peak. Pure but for the page: it takes the snapshot of ``torch.cuda.memory`` as plain values.

PyTorch's own page fetches its script from the network and carries the snapshot as a pickle.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from outgrow.html_page import figure, render_page

Event: TypeAlias = Mapping[str, Any]
_MOST_POINTS = 4000
_MOST_HOLDERS = 40
_FRAMES = 6
_LIBRARIES = ("/torch/", "/site-packages/", "<frozen")

_BODY = """
<h1>{{ title }}</h1>
<p class="soft">{{ about }}</p>
<section class="card"><h2>Allocated</h2>{{ plot("allocated") }}</section>
<section class="card"><h2>Who held memory at the peak of {{ peak }}</h2>
<p class="note">Allocations made in the window, by the Python stack that made them; what was there before stands as one row.</p>
{{ table(rows, (3,)) }}</section>
"""


@dataclass(frozen=True, kw_only=True)
class History:
    """Allocated bytes after each event, with seconds since the first; and at the peak bytes and number of live allocations by
    what made them."""

    seconds: tuple[float, ...]
    allocated: tuple[int, ...]
    holders: tuple[tuple[str, int, int], ...]

    @property
    def peak(self) -> int:
        return max(self.allocated, default=0)


def history_of(snapshot: Mapping[str, Any], device: int) -> History:
    """The history of one device from ``torch.cuda.memory._snapshot()``."""
    events: Sequence[Event] = snapshot["device_traces"][device] if snapshot["device_traces"] else ()
    changes = [(event, _change(event)) for event in events]
    before = _active_bytes(snapshot, device) - sum(change for _, change in changes)
    allocated, seconds = [before], [0.0]
    for event, change in changes:
        allocated.append(allocated[-1] + change)
        seconds.append((event["time_us"] - events[0]["time_us"]) / 1e6)
    at_peak = allocated.index(max(allocated))
    return History(
        seconds=tuple(seconds), allocated=tuple(allocated), holders=_holders([e for e, _ in changes[:at_peak]], max(allocated))
    )


def _change(event: Event) -> int:
    return {"alloc": 1, "free_completed": -1}.get(event["action"], 0) * int(event["size"])


def _active_bytes(snapshot: Mapping[str, Any], device: int) -> int:
    """What is allocated when the snapshot is taken."""
    return sum(
        block["size"]
        for segment in snapshot["segments"]
        if segment["device"] == device
        for block in segment["blocks"]
        if block["state"] != "inactive"
    )


def _holders(events: Sequence[Event], peak: int) -> tuple[tuple[str, int, int], ...]:
    """Bytes and number of what lives after ``events``, by stack, the most first; the rest of ``peak`` was there before."""
    live: dict[int, Event] = {}
    for event in events:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif event["action"] == "free_completed":
            live.pop(event["addr"], None)
    held, count = Counter[str](), Counter[str]()
    for event in live.values():
        where = stack_of(event.get("frames", ()))
        held[where] += event["size"]
        count[where] += 1
    earlier = ("there before the window", peak - held.total(), 0)
    return (*((where, held[where], count[where]) for where, _ in held.most_common(_MOST_HOLDERS)), earlier)


def stack_of(frames: Sequence[Mapping[str, Any]]) -> str:
    """The innermost frames that are no library's, else the innermost of all; one a line."""
    own = [frame for frame in frames if not any(part in frame["filename"] for part in _LIBRARIES)] or frames
    return "\n".join(f"{frame['name']}  {frame['filename']}:{frame['line']}" for frame in own[:_FRAMES]) or "no Python stack"


def render_history(history: History, title: str) -> str:
    """The page. A long history is drawn by the highest of neighbouring points."""
    size = max(1, -(-len(history.allocated) // _MOST_POINTS))
    tops = [
        max(range(at, min(at + size, len(history.allocated))), key=history.allocated.__getitem__)
        for at in range(0, len(history.allocated), size)
    ]
    line = {
        "type": "scatter",
        "x": [history.seconds[at] for at in tops],
        "y": [history.allocated[at] / 1e9 for at in tops],
        "line": {"shape": "hv"},
        "fill": "tozeroy",
    }
    plot = figure([line], 360, xaxis={"title": {"text": "seconds"}}, yaxis={"title": {"text": "GB"}, "rangemode": "tozero"})
    rows = [
        ("MB", "allocations", "made by"),
        *((f"{size / 1e6:,.1f}", f"{count:,}" if count else "", where) for where, size, count in history.holders),
    ]
    about = f"{len(history.allocated) - 1:,} allocations and frees of the device's allocator."
    peak = f"{history.peak / 1e9:.3f} GB"
    return render_page(title, _BODY, {"allocated": plot}, about=about, peak=peak, rows=rows)
