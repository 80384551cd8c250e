"""``outgrow runs``: the run folders of a site, and what is known of one."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from outgrow.cli.opening import SiteOption, open_site
from outgrow.cli.table import print_table

if TYPE_CHECKING:
    from outgrow.cluster.runs import RunStatus
    from outgrow.contracts import CheckpointRef, StepRecord

app = typer.Typer(no_args_is_help=True, help="See the runs of a site.")

_COLUMNS = ("run", "state", "step", "loss", "validation", "started")


@app.command("list")
def list_(site: SiteOption = None) -> None:
    """List the runs of the site, the oldest first."""
    from outgrow.cluster.runs import status, stored_runs

    storage = open_site(site).open_storage()
    rows = [_row(status(storage, run)) for run in stored_runs(storage)]
    if rows:
        print_table(_COLUMNS, rows)
    else:
        typer.echo(f"no runs in {storage.root_url}")


@app.command()
def show(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a name: its newest run.", show_default=False)],
    site: SiteOption = None,
) -> None:
    """Show what RUN learns, how far it is, and its checkpoints."""
    from outgrow.cluster.runs import find_run, status
    from outgrow.streaming.quarantine import describe, read_losses
    from outgrow.trainers.checkpoint.catalog import survey

    storage = open_site(site).open_storage()
    known = status(storage, find_run(storage, run))
    checkpoints = survey(storage, known.stored.ref.folder)
    for label, text in _details(known, storage.root_url):
        typer.echo(f"{label:<12}{text}")
    for saved in checkpoints.saved:
        typer.echo(f"{'checkpoint':<12}{_checkpoint(saved.ref)}")
    for refused in checkpoints.refused:
        typer.echo(f"{'not whole':<12}{refused.folder}: {refused.reason}")
    for loss in read_losses(storage, known.stored.ref.folder):
        typer.echo(f"{'lost shard':<12}{loss.stream} {loss.shard}: {describe(loss)}; {loss.reason}")


@app.command()
def track(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or a name: its newest run.", show_default=False)],
    to: Annotated[
        list[str] | None,
        typer.Option("--to", help="tensorboard, mlflow or wandb, each with an option of its own; else those of the recipe."),
    ] = None,
    site: SiteOption = None,
) -> None:
    """Make the files of RUN's trackers anew from its events.jsonl; those that are there are replaced."""
    from outgrow.cluster.run_lock import holder
    from outgrow.cluster.runs import find_run
    from outgrow.errors import RunError
    from outgrow.monitoring.recording.attempt import node_folder
    from outgrow.monitoring.trackers import known_trackers, rebuild

    opened = open_site(site)
    storage = opened.open_storage()
    stored = find_run(storage, run)
    folder = stored.ref.folder
    names = known_trackers(to if to else stored.file.recipe.get("logging", {}).get("trackers", ("tensorboard",)))
    if owner := holder(storage, folder):
        raise RunError(f"it goes on just now ({owner}), and tells its trackers itself", where=folder, hint="stop it first")
    for name in names:
        told = rebuild(name, stored.file.recipe, storage, folder, node_folder(opened))
        typer.echo(f"{name:<12}{told:,} records  {storage.root_url.rstrip('/')}/{folder}/{name}")


def _row(known: RunStatus) -> tuple[str, ...]:
    folder = known.stored.ref.folder.rpartition("/")[2]
    loss, validation = _loss(known.newest.get("step")), _loss(known.newest.get("validation"))
    started = known.stored.file.created[:16].replace("T", " ")
    return folder, known.state, _progress(known.last), loss, validation, started


def _details(known: RunStatus, root: str) -> list[tuple[str, str]]:
    recipe = known.stored.file.recipe
    last, step = known.last, known.newest.get("step")
    lines = [
        ("run", known.stored.ref.folder.rpartition("/")[2]),
        ("folder", f"{root.rstrip('/')}/{known.stored.ref.folder}"),
        ("state", f"{known.state} ({known.owner})" if known.owner else known.state),
        ("started", known.stored.file.created),
        ("fingerprint", known.stored.ref.fingerprint),
        ("model", " ".join(recipe["model"][key] for key in ("kind", "family", "path", "factory") if key in recipe["model"])),
        ("data", ", ".join(stream["name"] for stream in recipe["data"]["streams"])),
        ("step", _progress(last)),
        ("loss", _loss(step)),
        ("validation", _loss(known.newest.get("validation"))),
    ]
    if step is not None and step.tokens_per_s is not None:
        lines.append(("speed", f"{step.tokens_per_s:,.0f} tokens/s"))
    if last is not None:
        lines.append(("last record", f"{last.kind} at {datetime.fromtimestamp(last.time, UTC).isoformat(timespec='seconds')}"))
        if last.detail:
            lines.append(("", json.dumps(last.detail, ensure_ascii=False)))
    return lines


def _progress(record: StepRecord | None) -> str:
    return f"{record.step:,}/{record.steps:,}" if record is not None else "-"


def _loss(record: StepRecord | None) -> str:
    return f"{record.loss:.4f}" if record is not None and record.loss is not None else "-"


def _checkpoint(ref: CheckpointRef) -> str:
    from outgrow.cluster.plan import size

    return f"step {ref.step:,}  {size(ref.bytes)}  {ref.folder}"
