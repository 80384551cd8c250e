"""``outgrow data``: build a recipe's dataset, look into it, and check every byte of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from outgrow.cli.opening import Opened, OverridesArgument, RecipeArgument, SiteOption, open_recipe

if TYPE_CHECKING:
    from outgrow.contracts import DatasetCard
    from outgrow.streaming.store import Progress

app = typer.Typer(no_args_is_help=True, help="Build datasets and look into them.")

_LINE_EVERY_S = 10.0
"""Seconds between lines of progress where there is no terminal."""


@app.command()
def build(recipe: RecipeArgument, overrides: OverridesArgument = None, site: SiteOption = None) -> None:
    """Tokenise the streams of RECIPE into a dataset; does nothing where it is built and its sources are unchanged."""
    from outgrow.streaming.build import build as build_dataset

    opened = open_recipe(recipe, overrides, site)
    with show_progress() as progress:
        result = build_dataset(opened.recipe, opened.site, progress=progress)
    typer.echo(result.note)
    if result.built:
        typer.echo(_described(opened, result.card))


@app.command()
def card(recipe: RecipeArgument, overrides: OverridesArgument = None, site: SiteOption = None) -> None:
    """Show what the dataset of RECIPE holds."""
    opened = open_recipe(recipe, overrides, site)
    typer.echo(_described(opened, _card(opened)))


@app.command()
def inspect(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    site: SiteOption = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")] = 3,
) -> None:
    """Show the first rows that training on RECIPE reads, decoded, with the boundaries of documents."""
    from outgrow.streaming.inspect import first_rows

    opened = open_recipe(recipe, overrides, site)
    for row in first_rows(opened.site, _card(opened), rows):
        length = opened.recipe.data.sequence_length
        typer.echo(f"=== row {row.row_id} of stream {row.stream}: {row.tokens:,} of {length:,} tokens")
        for segment in row.segments:
            stop = segment.start + segment.length
            typer.echo(f"--- {segment.source}: tokens {segment.start:,} to {stop:,} of {segment.document_tokens:,}")
            typer.echo(segment.text)


@app.command()
def verify(recipe: RecipeArgument, overrides: OverridesArgument = None, site: SiteOption = None) -> None:
    """Read every file of the dataset of RECIPE again and compare it with its digest."""
    from outgrow.streaming.verify import verify as verify_dataset

    opened = open_recipe(recipe, overrides, site)
    found = _card(opened)
    verified = verify_dataset(opened.site.open_storage(), found)
    typer.echo(f"{found.store}: {verified.files} files, {verified.num_bytes / 1e6:,.1f} MB, every digest holds")


def _card(opened: Opened) -> DatasetCard:
    from outgrow.errors import DataError
    from outgrow.streaming.build import find

    found = find(opened.recipe, opened.site)
    if found is None:
        raise DataError(
            "its dataset is not built", where=str(opened.recipe_path), hint=f"outgrow data build {opened.recipe_path}"
        )
    return found


def _described(opened: Opened, found: DatasetCard) -> str:
    from outgrow.streaming.card import describe
    from outgrow.streaming.verify import stored_facts

    return describe(found, stored_facts(opened.site.open_storage(), found))


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
            bars.update(task, description=progress.stage, completed=progress.done_bytes, total=total, rate=_rate(progress))

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
        left_s = progress.seconds * (progress.total_bytes / progress.done_bytes - 1) if progress.done_bytes else 0.0
        words = [f"{progress.stage}{share}", _rate(progress), f"{left_s:,.0f} s left" if left_s else ""]
        typer.echo(", ".join(filter(None, words)), err=True)


def _rate(progress: Progress) -> str:
    return f"{progress.tokens / progress.seconds:,.0f} tokens/s" if progress.tokens else ""
