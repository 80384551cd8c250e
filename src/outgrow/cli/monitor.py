"""``outgrow monitor``: start what shows the runs of this machine, say how it is, and end it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from outgrow.cli.opening import INTERRUPTED, SiteOption, open_site
from outgrow.cli.table import print_table

if TYPE_CHECKING:
    from outgrow.monitoring.stack.part import Outcome
    from outgrow.monitoring.stack.status import Alert, PartStatus, Status, Target

app = typer.Typer(no_args_is_help=True, help="Show every run of this machine in Grafana, and raise alerts.")

_OUTCOMES = ("part", "state", "address", "pid", "version")
_PARTS = (*_OUTCOMES, "since")
_TARGETS = ("target", "node", "job", "state")
_ALERTS = ("alert", "state", "where", "what")


@app.command()
def up(site: SiteOption = None) -> None:
    """Start Prometheus, Alertmanager, Grafana and the node agent, as far as they are installed.

    What runs as the site says is left alone. The exit code is 1 where one that is installed does not come up.
    """
    from outgrow.monitoring.stack.access import shown_url
    from outgrow.monitoring.stack.grafana import PASSWORD_FILE, USER
    from outgrow.monitoring.stack.up import stack_folder
    from outgrow.monitoring.stack.up import up as bring_up

    opened = open_site(site)
    outcomes = bring_up(opened)
    address = opened.monitoring.address
    print_table(_OUTCOMES, [_outcome_row(one, shown_url(one.url, address) if one.url else "") for one in outcomes])
    for one in outcomes:
        if one.text:
            typer.echo(f"\n{one.name}: {one.text}")
    if any(one.name == "grafana" and one.pid for one in outcomes):
        typer.echo(f"\nGrafana: user {USER}, password in {stack_folder(opened) / PASSWORD_FILE}")
    if any(one.result == "failed" for one in outcomes):
        raise typer.Exit(1)


@app.command()
def down(site: SiteOption = None) -> None:
    """End what up has started, and nothing else. What was recorded is kept."""
    from outgrow.monitoring.stack.up import down as take_down

    ended = take_down(open_site(site))
    for name, one in ended:
        typer.echo(f"{name} (pid {one.pid}) ended")
    if not ended:
        typer.echo("nothing was running that outgrow monitor up has started")


@app.command()
def status(site: SiteOption = None) -> None:
    """Show the parts, what Prometheus reaches, and the alerts. The exit code is 1 where a part is missing that was started."""
    from outgrow.monitoring.stack.grafana import USER
    from outgrow.monitoring.stack.status import status as look

    found = look(open_site(site))
    print_table(_PARTS, [_part_row(part) for part in found.parts])
    _show_targets(found)
    _show_alerts(found.alerts)
    if found.password_file is not None:
        typer.echo(f"\nGrafana: user {USER}, password in {found.password_file}")
    if not found.is_whole:
        raise typer.Exit(1)


@app.command()
def agent(
    site: SiteOption = None,
    keep: Annotated[bool, typer.Option("--keep", help="Stay, also when there is no run for a while.")] = False,
) -> None:
    """Serve the runs of this node as Prometheus metrics, in the foreground. A run starts one by itself where there is none."""
    from outgrow.monitoring.agent.lifetime import serve

    try:
        serve(open_site(site), keep=keep)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def compose(
    folder: Annotated[Path, typer.Argument(help="The folder to write.")] = Path("monitoring-compose"),
    site: SiteOption = None,
) -> None:
    """Write a docker-compose.yml that starts the same in containers, for a machine without these programs."""
    from outgrow.monitoring.stack import compose as composing
    from outgrow.monitoring.stack.grafana import PASSWORD_FILE, USER

    names = composing.write(open_site(site), folder.absolute())
    typer.echo(f"wrote {folder / composing.FILE}: {', '.join(names)}")
    typer.echo(f"start it:  docker compose --file {folder / composing.FILE} up --detach")
    if "grafana" in names:
        typer.echo(f"Grafana: user {USER}, password in {folder / PASSWORD_FILE}")
    typer.echo("the node agent runs outside: outgrow monitor agent --keep")


def _outcome_row(one: Outcome, address: str) -> tuple[str, ...]:
    return (one.name, one.result, address or "-", str(one.pid or "-"), one.version or "-")


def _part_row(part: PartStatus) -> tuple[str, ...]:
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(part.since)) if part.since else "-"
    return (part.name, part.state, part.url or "-", str(part.pid or "-"), part.version or "-", since)


def _show_targets(found: Status) -> None:
    if found.targets:
        typer.echo()
        print_table(_TARGETS, [_target_row(one) for one in found.targets])
    if found.behind_s is not None:
        typer.echo(f"\nsamples are sent on, {found.behind_s:.0f} s behind")


def _target_row(one: Target) -> tuple[str, ...]:
    return (one.address, one.node or "-", one.job, one.error or "up")


def _show_alerts(alerts: Sequence[Alert]) -> None:
    if not alerts:
        return
    typer.echo()
    print_table(_ALERTS, [_alert_row(one) for one in alerts])


def _alert_row(one: Alert) -> tuple[str, ...]:
    where = ", ".join(f"{key} {one.labels[key]}" for key in ("run", "node", "rank", "gpu", "tier") if key in one.labels)
    return (one.name, one.state, where or "-", one.summary)
