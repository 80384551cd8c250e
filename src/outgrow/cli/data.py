"""``outgrow data``: build a recipe's dataset, look into it, and check every byte of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outgrow.cli.data_place import place
from outgrow.cli.data_simulate import simulate
from outgrow.cli.opening import (
    INTERRUPTED,
    Opened,
    OverridesArgument,
    RecipeArgument,
    SiteOption,
    built_card,
    open_recipe,
    open_site,
)

if TYPE_CHECKING:
    from outgrow.contracts import DatasetCard
    from outgrow.streaming.build import BuildResult
    from outgrow.streaming.store import Progress

app = typer.Typer(no_args_is_help=True, help="Build datasets and look into them.")

_LINE_EVERY_S = 10.0
"""Seconds between lines of progress where there is no terminal."""
_STAGES = {"waiting": "waiting for another process that builds the same dataset", "selection": "choice of documents"}
"""Stages that need more words than their name."""


@app.command()
def detect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A file or folder.", show_default=False)],
) -> None:
    """Look at the files at PATH and write the streams of a recipe that would read them; nothing is built."""
    from outgrow.streaming.detect import detect as propose
    from outgrow.streaming.detect import render

    typer.echo(render(propose(path)), nl=False)


@app.command()
def build(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    site: SiteOption = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Tokenise on the Ray cluster that is there, else on an embedded one.")
    ] = False,
) -> None:
    """Tokenise the streams of RECIPE into a dataset; goes on where an earlier build was interrupted, and does nothing where it
    is built and its sources are unchanged."""
    opened = open_recipe(recipe, overrides, site)
    try:
        with show_progress() as progress:
            result = _build_on_ray(opened, progress) if ray else _build_here(opened, progress)
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command goes on with what is finished", err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(result.note)
    if result.built:
        typer.echo(_described(opened, result.card))


@app.command()
def card(recipe: RecipeArgument, overrides: OverridesArgument = None, site: SiteOption = None) -> None:
    """Show what the dataset of RECIPE holds."""
    opened = open_recipe(recipe, overrides, site)
    typer.echo(_described(opened, built_card(opened)))


@app.command()
def inspect(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    site: SiteOption = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")] = 3,
    step: Annotated[int, typer.Option("--step", min=0, help="The optimizer step whose rows come first.")] = 0,
) -> None:
    """Show the rows that training on RECIPE reads, decoded, with the boundaries of documents; what alone is learned of one
    stands between brackets."""
    from outgrow.streaming.inspect import first_rows

    opened = open_recipe(recipe, overrides, site)
    for row in first_rows(opened.recipe, opened.site, built_card(opened), rows, step=step):
        place = f"step {row.step}: row {row.row_id} of stream {row.stream}"
        typer.echo(f"=== {place}: {row.tokens:,} of {row.sequence_length:,} tokens")
        for segment in row.segments:
            answer = f" ({segment.answer})" if segment.answer else ""
            stop = segment.start + segment.length
            typer.echo(f"--- {segment.source}{answer}: tokens {segment.start:,} to {stop:,} of {segment.document_tokens:,}")
            typer.echo(segment.marked)


@app.command()
def dropped(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    site: SiteOption = None,
    stream: Annotated[str | None, typer.Option("--stream", help="Of this stream alone.", show_default=False)] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Dropped for this reason alone.", show_default=False)] = None,
    limit: Annotated[int, typer.Option("--limit", min=0, help="At most so many; 0 for all.")] = 50,
) -> None:
    """List the documents of RECIPE's dataset that are in no row, each with its reason; quarantined ones with what they held."""
    from outgrow.streaming.dropped import as_text
    from outgrow.streaming.dropped import dropped as list_dropped

    opened = open_recipe(recipe, overrides, site)
    lines = list_dropped(opened.site, built_card(opened), stream, reason)
    for line in islice(lines, limit or None):
        typer.echo(as_text(line))
    more = sum(1 for _ in lines)
    if more:
        typer.echo(f"and {more:,} more: --limit 0 shows all")


@app.command()
def report(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    site: SiteOption = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The HTML file to write.")] = Path("data-report.html"),
) -> None:
    """Write one HTML page with plots of what the dataset of RECIPE is made of, and what is worth a second look."""
    from outgrow.streaming.report import make_report

    opened = open_recipe(recipe, overrides, site)
    out.write_text(make_report(opened.site, built_card(opened), opened.recipe), encoding="utf-8")
    typer.echo(f"report: {out}")


@app.command()
def verify(recipe: RecipeArgument, overrides: OverridesArgument = None, site: SiteOption = None) -> None:
    """Read every file of the dataset of RECIPE again and compare it with its digest."""
    from outgrow.streaming.verify import verify as verify_dataset

    opened = open_recipe(recipe, overrides, site)
    found = built_card(opened)
    verified = verify_dataset(opened.site.open_storage(), found)
    typer.echo(f"{found.store}: {verified.files} files, {verified.num_bytes / 1e6:,.1f} MB, every digest holds")


@app.command()
def unfinished(
    site: SiteOption = None,
    remove_older: Annotated[
        float | None,
        typer.Option(
            "--remove-older", min=0, metavar="DAYS", help="Remove those not written to for so long.", show_default=False
        ),
    ] = None,
) -> None:
    """List the builds that never finished; each goes on when its recipe is built again with the same sources."""
    from outgrow.streaming.aside import remove_unfinished
    from outgrow.streaming.aside import unfinished as list_unfinished

    opened = open_site(site)
    storage = opened.open_storage()
    root = Path(storage.path("datasets")) if storage.is_local else Path(opened.cache).expanduser() / "datasets"
    for left in list_unfinished(root):
        days = left.idle_s / 86_400
        stale = remove_older is not None and days >= remove_older
        state = "being built" if left.in_use else "removed" if stale and remove_unfinished(left) else "kept"
        typer.echo(f"datasets/{left.name}: {left.num_bytes / 1e6:,.1f} MB, last written to {days:.1f} days ago, {state}")


app.command()(simulate)
app.command()(place)


# --- steps of the commands --------------------------------------------------------------------------------------------


def _build_here(opened: Opened, progress: Callable[[Progress], None]) -> BuildResult:
    from outgrow.streaming.build import build as build_dataset

    return build_dataset(opened.recipe, opened.site, progress=progress)


def _build_on_ray(opened: Opened, progress: Callable[[Progress], None]) -> BuildResult:
    from outgrow.cluster.inventory import take_inventory
    from outgrow.cluster.ray_cluster import announce, connect, locate
    from outgrow.cluster.ray_map import ray_map
    from outgrow.streaming.build import build as build_dataset

    target = locate(opened.site.cluster)
    typer.echo(announce(target))
    here = take_inventory([])
    with connect(target, opened.site.cluster, cpus=here.cores, gpus=len(here.gpus)) as cluster:
        typer.echo(f"  on {cluster}")
        if opened.site.build_processes == "auto":
            opened = opened.with_site(build_processes=max(1, sum(node.cpus for node in cluster.nodes)))
        return build_dataset(opened.recipe, opened.site, progress=progress, mapper=ray_map)


def _described(opened: Opened, found: DatasetCard) -> str:
    from outgrow.streaming.card import describe
    from outgrow.streaming.verify import stored_facts, stored_index_facts

    storage = opened.site.open_storage()
    return describe(found, stored_facts(storage, found), stored_index_facts(storage, found))


# --- progress ---------------------------------------------------------------------------------------------------------


@contextmanager
def show_progress() -> Iterator[Callable[[Progress], None]]:
    """A function that shows how far a build is: a bar on a terminal, a line every ten seconds elsewhere."""
    if not sys.stderr.isatty():
        yield _Lines().show
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"))
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", rate="")

        def show(progress: Progress) -> None:
            total = progress.total_bytes or None
            bars.update(task, description=_stage(progress), completed=progress.done_bytes, total=total, rate=_rate(progress))

        yield show


class _Lines:
    """Progress in plain lines: each stage at its start, then at most one line every ten seconds."""

    def __init__(self) -> None:
        self._stage = ""
        self._next = 0.0

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if progress.stage == self._stage and now < self._next:
            return
        self._stage, self._next = progress.stage, now + _LINE_EVERY_S
        share = f" {progress.done_bytes / progress.total_bytes:.0%}" if progress.total_bytes else ""
        done_now = progress.done_bytes - progress.found_bytes
        left_s = progress.seconds * (progress.total_bytes - progress.done_bytes) / done_now if done_now else 0.0
        words = [f"{_stage(progress)}{share}", _rate(progress), f"{left_s:,.0f} s left" if left_s else ""]
        typer.echo(", ".join(filter(None, words)), err=True)


def _stage(progress: Progress) -> str:
    return _STAGES.get(progress.stage, progress.stage)


def _rate(progress: Progress) -> str:
    return f"{progress.tokens / progress.seconds:,.0f} tokens/s" if progress.tokens else ""
