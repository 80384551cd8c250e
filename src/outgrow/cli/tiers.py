"""``outgrow tiers``: how full and how well the disks and buckets of a site are, and the shards that runs have copied there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from outgrow.cli.opening import SiteOption, open_site
from outgrow.cli.table import print_table

if TYPE_CHECKING:
    from outgrow.streaming.tiers.health import PlaceState
    from outgrow.streaming.tiers.slot import SlotState

app = typer.Typer(invoke_without_command=True)

_PLACES = ("tier", "path", "kind", "capacity", "copies", "shards", "free", "reserve", "speed", "read errors", "health")
_SLOTS = ("slot", "tier", "run", "state", "taken", "room", "hits", "used")


@app.callback()
def show(context: typer.Context, site: SiteOption = None) -> None:
    """Show the disks and buckets of a site: fill, speed, health, and the copied shards of runs.

    A small file is written to each and removed; the exit code is 1 where one cannot be used.
    """
    if context.invoked_subcommand is not None:
        return
    from outgrow.streaming.tiers.health import examine, read_errors

    states = examine(open_site(site))
    errors, speeds = read_errors(states), _measured(states)
    print_table(_PLACES, [_place_row(state, speeds, errors.get(state.place.name, {})) for state in states])
    slots = [_slot_row(slot, state.place.name) for state in states for slot in state.slots]
    if slots:
        typer.echo()
        print_table(_SLOTS, slots)
    if any(state.problem for state in states):
        raise typer.Exit(1)


@app.command()
def clean(
    context: typer.Context,
    site: SiteOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")] = False,
) -> None:
    """Remove the copied shards that no run is using. They are copied again when a run needs them."""
    from outgrow.streaming.tiers.places import open_places
    from outgrow.streaming.tiers.slot import remove_unheld
    from outgrow.streaming.tiers.slot_room import shown

    given = site or (context.parent.params["site"] if context.parent else None)
    done, total = "would be removed" if dry_run else "removed", 0
    for place in open_places(open_site(given)):
        for slot in remove_unheld(place, dry_run=dry_run) if place.is_local else ():
            typer.echo(f"{place.name}: {slot.name}, {shown(slot.num_bytes)} of {slot.run or 'a command'}, {done}")
            total += slot.num_bytes
    typer.echo(f"{shown(total)} {done}")


def _measured(states: Sequence[PlaceState]) -> dict[str, float]:
    """Bytes a second by name of the place, as runs measured it last."""
    from outgrow.streaming.tiers.slot import newest_speeds

    return newest_speeds([slot for state in states for slot in state.slots])


def _place_row(state: PlaceState, measured: Mapping[str, float], errors: Mapping[str, int]) -> tuple[str, ...]:
    from outgrow.recipes.schema.options import without_credentials
    from outgrow.streaming.tiers.slot_room import shown

    place, tier = state.place, state.place.tier
    known = [(tier.bytes_per_s, "given"), (measured.get(place.name), "measured")]
    return (
        place.name,
        without_credentials(tier.path),
        "disk" if place.is_local else "bucket",
        "-" if tier.capacity_bytes is None else shown(tier.capacity_bytes),
        shown(state.placed_bytes),
        shown(state.slot_bytes),
        "-" if state.free_bytes is None else shown(state.free_bytes),
        shown(tier.reserve_bytes) if place.is_local else "-",
        next((f"{shown(int(speed))}/s {how}" for speed, how in known if speed), "-"),
        ", ".join(f"{count:,} {kind}" for kind, count in sorted(errors.items())) or "-",
        state.problem or state.note or "ok",
    )


def _slot_row(slot: SlotState, tier: str) -> tuple[str, ...]:
    from outgrow.streaming.tiers.slot_room import shown

    counts = slot.counts
    return (
        slot.name,
        tier,
        slot.run or "-",
        f"held by process {slot.pid} on {slot.host}" if slot.leased else "free",
        shown(slot.num_bytes),
        shown(slot.room_bytes),
        f"{counts.hits / counts.visits:.1%} of {counts.visits:,}" if counts and counts.visits else "-",
        time.strftime("%Y-%m-%d %H:%M", time.localtime(slot.last_used)),
    )
