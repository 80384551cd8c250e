"""``outgrow data simulate``: whether a slow disk or a bucket keeps up with a run, and with how large a cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outgrow.cli.opening import Opened, OverridesArgument, RecipeArgument, SiteOption, built_card, open_recipe
from outgrow.errors import DataError

if TYPE_CHECKING:
    from outgrow.contracts import DatasetCard
    from outgrow.streaming.tiers.forecast import Outlook

_RECORDS = 100
"""A run's step time is the median of its last so many records."""


def simulate(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    site: SiteOption = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", metavar="SIZE|PERCENT", help="The cache; else what a run gets here.", show_default=False),
    ] = None,
    step_s: Annotated[
        float | None,
        typer.Option("--step-s", metavar="SECONDS", help="Of a step; else what the run's steps took.", show_default=False),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="The first so many; else the whole run.", show_default=False)
    ] = None,
    speed: Annotated[
        list[str] | None,
        typer.Option("--speed", metavar="TIER=RATE", help="What a tier reads, such as 'hdd=180 MB/s'.", show_default=False),
    ] = None,
    latency: Annotated[
        list[str] | None,
        typer.Option("--latency", metavar="TIER=SECONDS", help="Before the first byte of a file.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Predict how RECIPE's run reads its shards through the first tier: hits, bytes, and how long it waits. Reads no shard."""
    from outgrow.recipes.schema.sizes import parse_rate
    from outgrow.streaming.tiers.forecast import Assumptions, look_ahead

    if step_s is not None and step_s <= 0:
        raise DataError(f"given {step_s:g}; allowed: seconds above 0", where="--step-s")
    cache = _checked_cache(cache)
    speeds, latencies = _by_tier("--speed", speed, parse_rate), _by_tier("--latency", latency, _seconds)
    opened = open_recipe(recipe, overrides, site)
    card = built_card(opened)
    given = Assumptions(
        step_s=step_s or _measured_step_s(opened, card),
        steps=steps,
        cache=cache,
        bytes_per_s=speeds,
        latency_s=latencies,
    )
    outlook = look_ahead(opened.recipe, opened.site, card, given)
    if as_json:
        typer.echo(json.dumps(_figures(outlook), indent=2))
        return
    for label, text in _described(outlook):
        typer.echo(f"{label:<13}{text}")
    typer.echo(_verdict(outlook))


# --- what is given ----------------------------------------------------------------------------------------------------


def _measured_step_s(opened: Opened, card: DatasetCard) -> float:
    """Seconds a step of the newest run that learns the same, without its waits for data. Raises ``DataError`` where there is
    none."""
    from outgrow.cluster.runs import stored_runs
    from outgrow.monitoring.events import read_events
    from outgrow.recipes.identity import fingerprint

    storage, learned = opened.site.open_storage(), fingerprint(opened.recipe, card.data_fingerprint)
    for run in reversed(stored_runs(storage, opened.recipe.run.name)):
        records = [record for record in read_events(storage, run.ref.folder) if record.kind == "step" and record.step_s]
        if run.file.fingerprint == learned and records:
            return median((record.step_s or 0) - (record.data_wait_s or 0) for record in records[-_RECORDS:])
    raise DataError(
        "how long a step takes is not known: the recipe has not been run here yet",
        where=str(opened.recipe_path),
        hint="--step-s SECONDS",
    )


def _checked_cache(cache: str | None) -> str | None:
    """The size or share as it was given. Raises ``DataError`` for what is neither."""
    from outgrow.recipes.schema.sizes import parse_size

    if cache is None or re.fullmatch(r"\d+(\.\d+)?%", cache):
        return cache
    try:
        parse_size(cache)
    except ValueError as error:
        raise DataError(f"{error}; or a share of the shards, such as 25%", where="--cache") from None
    return cache


def _by_tier(option: str, given: Sequence[str] | None, parse: Callable[[str], float]) -> dict[str, float]:
    """The values of ``TIER=VALUE``. Raises ``DataError`` for what ``parse`` refuses."""
    values = {}
    for pair in given or ():
        tier, equals, text = pair.partition("=")
        try:
            if not equals:
                raise ValueError(f"given '{pair}'; allowed: TIER=VALUE")
            values[tier.strip()] = parse(text)
        except ValueError as error:
            raise DataError(str(error), where=option) from None
    return values


def _seconds(text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text.strip()) is None:
        raise ValueError(f"given '{text}'; allowed: seconds, such as 0.012")
    return float(text)


# --- what is shown ----------------------------------------------------------------------------------------------------


def _figures(outlook: Outlook) -> dict[str, Any]:
    """The outlook as plain data, with the shares that are worked out from it."""
    data = outlook.to_dict()
    for name in ("prefetched", "on_demand", "all_kept"):
        forecast = getattr(outlook, name)
        data[name] |= {"stall_share": forecast.stall_share, "load": forecast.load}
    return data | {"keeps_up": outlook.keeps_up}


def _described(outlook: Outlook) -> Iterator[tuple[str, str]]:
    """Labels and texts of the lines."""
    from outgrow.cluster.plan import size
    from outgrow.monitoring.live import duration

    room, source, ahead, asked = outlook.room, outlook.source, outlook.prefetched, outlook.on_demand
    yield "shards", f"{outlook.shards:,}, {size(outlook.shard_bytes)}"
    yield "cache", f"{size(room.total)} of tier {outlook.hot}, {size(room.ahead)} of it for reading ahead"
    yield "", f"the smallest that works: {size(room.smallest)}"
    latency = f", {source.latency_s:g} s before each file" if source.latency_s else ""
    yield "source", f"{source.name}: {size(round(source.bytes_per_s))}/s{latency}, {source.parallel} at once"
    yield "steps", f"{ahead.steps:,} of {outlook.pace.step_s:.3g} s"
    yield "visits", f"{ahead.visits:,} of a shard: {ahead.hits:,} hits ({ahead.hits / max(ahead.visits, 1):.1%})"
    yield "fetches", f"{ahead.fetches:,}, {size(ahead.fetched_bytes)} from {source.name}, {ahead.through:,} without a place"
    yield "load", f"{ahead.load:.0%} of what {source.name} reads while the steps compute"
    yield "first step", f"after {duration(ahead.start_s)}"
    yield "stall", f"{ahead.stall_share:.1%} ({duration(ahead.stall_s)}); without foresight {asked.stall_share:.1%}"
    yield "in all", f"{duration(ahead.total_s)}; without foresight {duration(asked.total_s)}"


def _verdict(outlook: Outlook) -> str:
    from outgrow.cluster.plan import size

    name, ahead = outlook.source.name, outlook.prefetched
    if outlook.keeps_up:
        return f"{name} keeps up: the run waits {ahead.stall_share:.1%} of its time"
    too_much = f", and needs {ahead.load:.1f}x what {name} reads meanwhile" if ahead.load > 1 else ""
    short = f"{name} does not keep up: the run waits {ahead.stall_share:.1%} of its time{too_much}"
    if outlook.enough_bytes is not None:
        return f"{short}; a cache of {size(outlook.enough_bytes)} would do"
    return f"{short}; with a cache for all shards it would wait {outlook.all_kept.stall_share:.1%}"
