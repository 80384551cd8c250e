"""``outgrow report``: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outgrow.cli.opening import SiteOption, open_site

if TYPE_CHECKING:
    from outgrow.monitoring.report import StoredFacts
    from outgrow.storage import Storage


def report(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a name: its newest run.", show_default=False)],
    site: SiteOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "--out", metavar="FILE", help="The HTML file; else RUN.html.", show_default=False)
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", metavar="RUN", help="Draw this run beside it; once for each.", show_default=False),
    ] = None,
) -> None:
    """Write one HTML page of RUN: what it learned, how fast, where its time went, what it cost. It opens without a network."""
    from outgrow.monitoring.report import make_report

    storage = open_site(site).open_storage()
    own, *others = (stored_facts(storage, asked) for asked in (run, *(compare or ())))
    out = output or Path(f"{own.ref.folder.rpartition('/')[2]}.html")
    out.write_text(make_report(storage, own, others), encoding="utf-8")
    typer.echo(f"report: {out}")


def stored_facts(storage: Storage, asked: str) -> StoredFacts:
    """What is stored of a run beside its records. Raises ``RunError`` with the nearest where there is none."""
    from outgrow.cluster import run_lock
    from outgrow.cluster.runs import find_run
    from outgrow.monitoring.report import StoredFacts

    found = find_run(storage, asked)
    owner = run_lock.holder(storage, found.ref.folder)
    return StoredFacts(
        ref=found.ref,
        created=found.file.created,
        recipe=found.file.recipe,
        owner=str(owner) if owner else "",
    )
