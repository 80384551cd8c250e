"""The command line, and the one place that ties the folders together. Heavy libraries are imported inside the commands."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer

from outgrow import __version__
from outgrow.cli import data, model, monitor, plan, quickstart, recipe, report, runs, site, tiers, top, train
from outgrow.errors import OutgrowError, UserError

app = typer.Typer(
    name="outgrow",
    help="Train on the one GPU you own, outgrow it without changing the recipe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for name, part in (
    ("recipe", recipe),
    ("site", site),
    ("data", data),
    ("tiers", tiers),
    ("runs", runs),
    ("monitor", monitor),
    ("model", model),
):
    app.add_typer(part.app, name=name)
app.command("quickstart")(quickstart.quickstart)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("submit")(train.submit)
app.command("report")(report.report)
app.command("top")(top.top)
app.command("export")(model.export)
app.command("generate")(model.generate)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"outgrow {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Options of every command; ``--debug`` is read in ``main``, where errors end."""


def main(arguments: list[str] | None = None) -> None:
    """Run a command. A user's mistake is one message on stderr and exit code 2, any other error of ours 1."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code: Any = app(args=words, standalone_mode=True)
    except OutgrowError as error:
        if "--debug" in words:
            traceback.print_exception(error)
        else:
            typer.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:
        if "--debug" in words:
            raise
        typer.echo(f"error: {error}\n  --debug shows where", err=True)
        sys.exit(1)
    sys.exit(code)
