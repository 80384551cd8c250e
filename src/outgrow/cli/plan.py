"""``outgrow plan``: what a run would do here, and every reason why it could not start."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from outgrow.cli.opening import (
    FreshOption,
    Opened,
    OverridesArgument,
    RecipeArgument,
    SiteOption,
    WorkersOption,
    open_recipe,
)

if TYPE_CHECKING:
    from outgrow.cluster.ray_cluster import Target
    from outgrow.contracts import DataReading, DatasetCard, Inventory, Plan


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    site: SiteOption = None,
    workers: WorkersOption = None,
    fresh: FreshOption = False,
) -> None:
    """Show what a run of RECIPE would do here, and why it could not start, with exit code 2; builds nothing."""
    from outgrow.cluster.inventory import take_inventory
    from outgrow.cluster.plan import render
    from outgrow.cluster.ray_cluster import announce, locate
    from outgrow.streaming.build import find

    opened = open_recipe(recipe, overrides, site)
    if workers is not None:
        opened = opened.with_site(workers=workers)
    target = locate(opened.site.cluster)
    card = find(opened.recipe, opened.site)
    made = plan_run(opened, take_inventory([Path(opened.site.cache)]), card, target, fresh=fresh)
    typer.echo(announce(target))
    typer.echo(render(made))
    if made.refusals:
        raise typer.Exit(2)


def plan_run(opened: Opened, inventory: Inventory, card: DatasetCard | None, target: Target, *, fresh: bool) -> Plan:
    """The plan of a run that goes to ``target``; ``inventory`` is of the machines that it has."""
    from outgrow.cluster.plan import make_plan
    from outgrow.cluster.ray_environment import driver_environment
    from outgrow.monitoring.trackers import check_trackers, tracker_environment
    from outgrow.trainers.models.build import facts
    from outgrow.trainers.schedule import learning_rate

    learning_rate(opened.recipe, 0, 1)  # a custom schedule that cannot be called is refused here
    check_trackers(opened.recipe)
    if card is not None:
        _check_tokenizer(opened, card)
    embedded = target.address is None
    environment = driver_environment(opened.site.cluster.token_file, embedded=embedded, environment=os.environ)
    return make_plan(
        opened.recipe,
        opened.site,
        inventory,
        card,
        facts(opened.recipe, opened.site, card),
        free_bytes=_room(opened, card, fresh=fresh),
        environment=environment | tracker_environment(opened.recipe.logging.trackers),
        cluster=target.address,
        reading=_reading(opened, card) if card is not None and embedded else None,
    )


def _reading(opened: Opened, card: DatasetCard) -> DataReading | None:
    """How this machine will read the dataset; None where its storage alone has it, which needs no word."""
    from outgrow.streaming.tiers.forecast import foresee_reading

    if not opened.site.tiers and opened.site.open_storage().is_local:
        return None
    return foresee_reading(opened.recipe, opened.site, card)


def _check_tokenizer(opened: Opened, card: DatasetCard) -> None:
    """Raises ``DataError`` where the model to go on from brings another tokenizer than the one that built the dataset.

    The dataset's may have more tokens: the tags, and the tokens of chat templates, that the recipe adds.
    """
    from outgrow.errors import DataError
    from outgrow.recipes.placed import weights_folder
    from outgrow.recipes.schema.model import FolderModel
    from outgrow.streaming.render.preparing import check_model_tokenizer

    if not isinstance(opened.recipe.model, FolderModel):
        return
    folder = weights_folder(opened.site, opened.recipe.model.path)
    if not (folder / "tokenizer.json").is_file():
        return
    try:
        check_model_tokenizer(card, folder, opened.recipe.data, opened.site)
    except DataError as error:
        error.where = str(folder)  # not the copy to which the tokens were added
        raise


def _room(opened: Opened, card: DatasetCard | None, *, fresh: bool) -> int | None:
    """Bytes that the storage has for this run: free ones, and those of the checkpoints it will replace; None for a bucket.

    Raises ``RunError`` where the name is already that of a run that learns something else.
    """
    from outgrow.cluster.runs import choose
    from outgrow.trainers.checkpoint.catalog import list_checkpoints

    storage = opened.site.open_storage()
    free = storage.free_bytes()
    if card is None:
        return free
    run, stored = choose(storage, opened.recipe, card.data_fingerprint, fresh=fresh)
    if free is None or stored is None:
        return free
    return free + sum(checkpoint.bytes for checkpoint in list_checkpoints(storage, run.folder))
