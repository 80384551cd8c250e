"""``outgrow train`` and ``outgrow submit``: from a recipe to a trained model, here or on a cluster."""

from __future__ import annotations

import contextlib
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from outgrow.cli.opening import (
    INTERRUPTED,
    AcceptOption,
    FreshOption,
    Opened,
    OverridesArgument,
    RecipeArgument,
    SiteOption,
    WorkersOption,
    open_recipe,
)

if TYPE_CHECKING:
    from outgrow.cluster.ray_cluster import RayCluster
    from outgrow.cluster.runs import Claim
    from outgrow.contracts import DatasetCard, JobSpec, Plan, RunRef, RunResult


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    site: SiteOption = None,
    workers: WorkersOption = None,
    fresh: FreshOption = False,
    accept: AcceptOption = False,
) -> None:
    """Train RECIPE, or resume it: build its dataset where that is missing, then run on the Ray cluster that is there."""
    opened = open_recipe(recipe, overrides, site)
    if workers is not None:
        opened = opened.with_site(workers=workers)
    try:
        with _terminable():
            result = _train(opened, fresh=fresh, accept=accept)
    except KeyboardInterrupt:
        typer.echo("\nstopped; the same command resumes from the newest checkpoint", err=True)
        raise typer.Exit(INTERRUPTED) from None
    _print_end(opened, recipe, site, result)


def _train(opened: Opened, *, fresh: bool, accept: bool) -> RunResult:
    from outgrow.cli.plan import plan_run
    from outgrow.cluster.inventory import take_inventory
    from outgrow.cluster.plan import refuse
    from outgrow.cluster.ray_cluster import announce, connect, locate, survey
    from outgrow.cluster.runs import claim
    from outgrow.monitoring.report.facts import PLAN_FILE
    from outgrow.recipes.schema.options import without_credentials
    from outgrow.streaming.build import find

    launched = time.time()
    target = locate(opened.site.cluster)
    typer.echo(announce(target))
    here = take_inventory([Path(opened.site.cache)])
    # Refused before the build, which may take hours, as far as that can be known then; and again with what it made.
    refuse(plan_run(opened, here, find(opened.recipe, opened.site), target, fresh=fresh))
    card = _build(opened)
    storage = opened.site.open_storage()
    with (
        claim(storage, opened.recipe, card.data_fingerprint, fresh=fresh, accept=accept) as claimed,
        connect(target, opened.site.cluster, cpus=here.cores, gpus=len(here.gpus)) as cluster,
    ):
        typer.echo(f"{_claimed(claimed)}\n  on {cluster}")
        plan = plan_run(opened, survey(cluster, here), card, target, fresh=False)
        refuse(plan)
        storage.write_json(f"{claimed.run.folder}/{PLAN_FILE}", plan.to_dict() | {"storage": without_credentials(plan.storage)})
        return _run(_job(opened, card, plan, claimed.run, launched), cluster)


# --- before the run ---------------------------------------------------------------------------------------------------


def _build(opened: Opened) -> DatasetCard:
    """The dataset's card; builds it where it is missing."""
    from outgrow.cli.data import show_progress
    from outgrow.streaming.build import build

    with show_progress() as progress:
        result = build(opened.recipe, opened.site, progress=progress)
    typer.echo(result.note)
    return result.card


def _claimed(claimed: Claim) -> str:
    """Which run folder this is, and what differs from what it began with."""
    lines = [f"{'resuming' if claimed.resumed else 'starting'} run {claimed.run.folder}"]
    if claimed.taken_from:
        lines.append(f"  its lock was left by {claimed.taken_from}, which is gone")
    lines += [f"  {change}" for change in claimed.differences]
    return "\n".join(lines)


def _job(opened: Opened, card: DatasetCard, plan: Plan, run: RunRef, launched: float) -> JobSpec:
    from outgrow.contracts import JobSpec

    return JobSpec(
        recipe=opened.recipe.to_dict(),
        site=opened.site.to_dict(),
        card=card,
        run=run,
        workers=plan.workers,
        threads_per_worker=plan.threads_per_worker,
        device=plan.device,
        launched=launched,
    )


# --- the run, and its end ---------------------------------------------------------------------------------------------


def _run(job: JobSpec, cluster: RayCluster) -> RunResult:
    from outgrow.cluster.ray_run import run
    from outgrow.monitoring.live import LiveLine
    from outgrow.trainers.loop import train_worker

    line = LiveLine()
    # Joining a cluster has put Ray's own handler in the place of ours.
    with contextlib.closing(line), _terminable():
        return run(job, train_worker, cluster=cluster, on_record=line.show, on_notice=line.say)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does: locks are released and processes ended on the way out."""

    def interrupt(signum: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_end(opened: Opened, recipe: Path, site: Path | None, result: RunResult) -> None:
    from outgrow.recipes.schema.adapter import NoAdapter
    from outgrow.recipes.schema.model import CustomModel

    worker = result.worker
    validation = f", validation loss {worker.validation_loss:.4f}" if worker.validation_loss is not None else ""
    root, name = opened.site.storage.rstrip("/"), PurePosixPath(result.run.folder).name
    merged = "" if isinstance(opened.recipe.adapter, NoAdapter) else " --merged"
    best, take_best = worker.best, " --best" if worker.best and worker.best.step != worker.step else ""
    lines = [
        "",
        f"finished {result.run.name} at step {worker.step}: training loss {worker.train_loss:.4f}{validation}",
        *([f"  ended early: {worker.ended}", "  to go on, change validation.on_rise and run it again"] if worker.ended else []),
        f"  {worker.tokens:,} tokens in {worker.seconds:.0f} s, {result.restarts} restart(s)",
        f"  run         {root}/{result.run.folder}",
        f"  checkpoint  {root}/{worker.checkpoint}",
        *([f"  best        {root}/{best.folder}  ({best.metric} {best.loss:.4f})"] if best and take_best else []),
        "next:",
        f"  outgrow report {name}{_site_words(site)}",
        f"  outgrow export {name} FOLDER{merged}{take_best}{_site_words(site)}",
        *([] if isinstance(opened.recipe.model, CustomModel) else ["  outgrow generate FOLDER 'Once upon a time'"]),
    ]
    typer.echo("\n".join(lines))


def _site_words(site: Path | None) -> str:
    return f" --site {shlex.quote(str(site))}" if site else ""


# --- as a job on another machine --------------------------------------------------------------------------------------


def submit(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    site: SiteOption = None,
    workers: WorkersOption = None,
    fresh: FreshOption = False,
    accept: AcceptOption = False,
    address: Annotated[
        str | None,
        typer.Option("--address", help="The job server, http://host:8265; else what the site says.", show_default=False),
    ] = None,
    no_follow: Annotated[bool, typer.Option("--no-follow", help="Return once the job is there.")] = False,
) -> None:
    """Train RECIPE as a job of the Ray cluster whose job server is at --address, and follow its log."""
    import tempfile

    from outgrow.cluster.submit import JobServer, pack, site_to_send

    opened = open_recipe(recipe, overrides, site)
    server = JobServer(address or opened.site.cluster.dashboard, opened.site.cluster.token_file)
    flags = [*(["--workers", str(workers)] if workers else []), *["--fresh"] * fresh, *["--accept"] * accept]
    with tempfile.TemporaryDirectory() as folder:
        parcel = pack(
            Path(folder),
            recipe=recipe,
            site=site_to_send(_raw_site(site), opened.site),
            overrides=overrides or (),
            flags=flags,
        )
        job_id = server.submit(parcel, opened.recipe.run.name)
    typer.echo(f"job {job_id} at {server.address}")
    if no_follow:
        typer.echo(f"follow it: {server.how_to_follow(job_id)}\nstop it:   {server.how_to_stop(job_id)}")
        return
    try:
        code = server.follow(job_id, lambda text: typer.echo(text, nl=False))
    except KeyboardInterrupt:
        typer.echo(
            f"\nthe job goes on\nfollow it: {server.how_to_follow(job_id)}\nstop it:   {server.how_to_stop(job_id)}", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    if code:
        raise typer.Exit(code)


def _raw_site(site: Path | None) -> dict[str, Any]:
    """The site file's data as they stand there; empty where there is no file."""
    from outgrow.errors import SiteError
    from outgrow.recipes.site_loading import find_site
    from outgrow.recipes.yaml_marks import read

    path = find_site(site, Path.cwd())
    return read(path, SiteError).data if path else {}
