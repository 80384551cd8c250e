"""A view of a run as rich draws it: tables for a terminal of any width. What comes from outside is drawn letter by letter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING

from outgrow.html_page import short, visible
from outgrow.monitoring.live import describe, duration
from outgrow.monitoring.top.view import RankLine, View

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderableType
    from rich.table import Table
    from rich.text import Text

SHOWN_RANKS = 16
SILENT_S = 30.0
"""A rank that gave no sign for longer is marked."""
_BAR = 28
_PAIR_CHARS = 36
_STYLES = {
    "running": "bold green",
    "finished": "bold green",
    "starting": "bold cyan",
    "restarting": "bold yellow",
    "stalled": "bold red",
    "lost": "bold red",
    "failed": "bold red",
    "interrupted": "yellow",
    "stopped": "yellow",
}
_NONE = "-"


def draw(view: View) -> Group:
    """All of it, from the most to the least wanted."""
    from rich.console import Group

    return Group(*_parts(view))


def _parts(view: View) -> Iterator[RenderableType]:
    from rich.text import Text

    yield _headline(view)
    yield _progress(view)
    yield Text()
    yield _Pairs(_figures(view))
    if view.phases:
        yield Text()
        yield _phases(view)
    if view.ranks:
        yield Text()
        yield _ranks(view)
    if view.shards:
        yield Text()
        yield from _tiers(view)
    if view.events:
        yield Text()
        yield from _events(view)
    yield Text()
    yield Text(visible("; ".join(view.notes)), style="dim")


def _headline(view: View) -> Text:
    from rich.text import Text

    return Text.assemble((visible(view.run), "bold"), "  ", (view.state, _STYLES.get(view.state, "bold")))


def _progress(view: View) -> Text:
    from rich.text import Text

    share = min(1.0, view.step / view.steps) if view.steps else 0.0
    done = round(share * _BAR)
    text = Text.assemble(("━" * done, "green"), ("━" * (_BAR - done), "bright_black"))
    text.append(f"  {share:.1%}  step {view.step:,} of {view.steps:,}")
    if view.remaining_s is not None:
        text.append(f"  {duration(view.remaining_s)} left")
    if view.remaining_usd is not None:
        text.append(f" (${view.remaining_usd:,.2f})")
    return text


def _figures(view: View) -> Iterator[tuple[str, str]]:
    yield "loss", _form(view.loss, ".4f")
    yield "validation", _form(view.validation_loss, ".4f")
    yield "learning rate", _form(view.learning_rate, ".3e")
    yield "gradient norm", _form(view.gradient_norm, ".3g")
    yield "tokens/s", _form(view.tokens_per_s, ",.0f")
    yield "MFU", ", ".join(f"{ratio:.1%} {ceiling}" for ceiling, ratio in view.mfu.items()) or _NONE
    yield "tokens", short(view.tokens).strip()
    yield "epoch", f"{view.epoch}"
    yield "goodput", _form(view.goodput, ".1%")
    yield "wall time", _NONE if view.wall_s is None else duration(view.wall_s)
    yield "checkpoint", _checkpoint(view)
    yield "restarts", _NONE if view.restarts is None else f"{view.restarts:,}"


def _checkpoint(view: View) -> str:
    step = "" if view.checkpoint_step is None else f"step {view.checkpoint_step:,}"
    age = "" if view.checkpoint_age_s is None else f"{duration(view.checkpoint_age_s)} ago"
    return ", ".join(part for part in (step, age) if part) or _NONE


class _Pairs:
    """Names and values, as many to a line as fit."""

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self._pairs = list(pairs)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        a_line = max(1, options.max_width // _PAIR_CHARS)
        for at in range(0, len(self._pairs), a_line):
            table.add_row(*(_pair(name, value) for name, value in self._pairs[at : at + a_line]))
        yield table


def _pair(name: str, value: str) -> Text:
    from rich.text import Text

    return Text.assemble((f"{name:<14}", "dim"), value)


def _phases(view: View) -> Text:
    from rich.text import Text

    parts = sorted(view.phases.items(), key=lambda item: -item[1])
    text = Text("phases        ", style="dim")
    text.append("  ".join(f"{phase} {share:.1%}" for phase, share in parts), style="default")
    return text


def _ranks(view: View) -> Table:
    """Those that trouble first where there are too many for a screen."""
    table = _table("rank", "node", "up", "step", "behind", "doing", "loss", "memory", "last sign")
    lines = sorted(view.ranks, key=lambda line: (not _troubles(line, view), line.rank))
    for line in sorted(lines[:SHOWN_RANKS], key=lambda line: line.rank):
        style = "red" if not line.alive and line.doing != "ended" else "yellow" if _troubles(line, view) else ""
        cells = (
            f"{line.rank}",
            line.host,
            "yes" if line.alive else "no",
            _NONE if line.step is None else f"{line.step:,}",
            f"{line.behind:,}",
            line.doing,
            _form(line.loss, ".4f"),
            _NONE if line.memory_bytes is None else f"{short(line.memory_bytes)}B",
            _NONE if line.silent_s is None else f"{duration(line.silent_s)} ago",
        )
        table.add_row(*map(_plain, cells), style=style)
    if len(lines) > SHOWN_RANKS:
        table.add_row(_plain(f"and {len(lines) - SHOWN_RANKS} more"))
    return table


def _troubles(line: RankLine, view: View) -> bool:
    over = view.state in ("finished", "failed", "interrupted", "stopped")
    return not over and (not line.alive or line.behind > 1 or (line.silent_s or 0.0) > SILENT_S)


def _tiers(view: View) -> Iterator[RenderableType]:
    from rich.text import Text

    shards = view.shards
    assert shards is not None
    hits = f"{shards.hits / shards.visits:.1%} hits" if shards.visits else "no visits"
    room = f"{short(shards.cache_bytes)}B of {short(shards.room_bytes)}B" if shards.room_bytes else ""
    table = _table("tier", "shards", "read", "MB/s", "errors")
    for name, own in shards.tiers.items():
        speed = f"{own.bytes / own.read_s / 1e6:,.1f}" if own.read_s else _NONE
        cells = (name, f"{own.shards:,}", f"{short(own.bytes)}B", speed, f"{sum(own.errors.values()):,}")
        table.add_row(*map(_plain, cells))
    words = (hits, room, f"{shards.refetches:,} fetched again", f"waited {shards.wait_s:,.1f} s", f"queue {shards.queue:,}")
    yield table
    yield Text(", ".join(word for word in words if word), style="dim")


def _events(view: View) -> Iterator[Text]:
    from rich.text import Text

    for record in view.events:
        when = datetime.fromtimestamp(record.time).strftime("%H:%M:%S")
        cause = record.detail.get("cause")
        why = f" ({str(cause).replace('_', ' ')})" if cause else ""
        failed = record.kind == "checkpoint" and record.detail.get("error")
        text = Text(f"{when}  ", style="dim")
        text.append(visible(describe(record) + why), style="red" if failed else "default")
        yield text


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for column in columns:
        left = column in ("node", "tier", "doing", "up")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    return table


def _plain(text: str) -> Text:
    from rich.text import Text

    return Text(visible(text))


def _form(value: float | None, form: str) -> str:
    return _NONE if value is None else format(value, form)
