"""``outgrow top``: a run as it is now, in the terminal."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from outgrow.cli.opening import SiteOption, open_site

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from outgrow.monitoring.top import Watch


def top(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a name: its newest run.", show_default=False)],
    site: SiteOption = None,
    once: Annotated[
        bool, typer.Option("--once", help="Show it once and end; so it is too where there is no terminal.")
    ] = False,
    interval: Annotated[float, typer.Option("--interval", min=0.2, metavar="S", help="Seconds between two looks.")] = 2.0,
) -> None:
    """Show RUN live: how far it is, how fast, what its ranks do, and where the time goes. Ctrl-C ends it, not the run."""
    from rich.console import Console

    from outgrow.cluster import run_lock
    from outgrow.cluster.runs import find_run
    from outgrow.monitoring.top import Watch, draw

    opened = open_site(site)
    storage = opened.open_storage()
    ref = find_run(storage, run).ref
    watch = Watch(opened, storage, ref, lambda: str(run_lock.holder(storage, ref.folder) or ""))
    console = Console()
    try:
        if once or not sys.stdout.isatty():
            console.print(draw(watch.look()))
        else:
            _live(console, watch, interval)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _live(console: Console, watch: Watch, interval_s: float) -> None:
    """Draw until Ctrl-C. A storage that does not answer for a while is said, and asked again."""
    from rich.live import Live

    from outgrow.monitoring.top import draw
    from outgrow.retry import Unreachable

    shown: RenderableType = draw(watch.look())
    with Live(shown, console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(shown, refresh=True)
            time.sleep(interval_s)
            try:
                shown = draw(watch.look())
            except (OSError, Unreachable) as error:
                shown = f"the storage does not answer, asked again every {interval_s:g} s: {type(error).__name__}"
