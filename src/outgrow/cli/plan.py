"""``outgrow plan``: what a run would do here, and every reason why it could not start."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

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
    from outgrow.recipes.schema.site import Site

GpusOption: TypeAlias = Annotated[
    int | None,
    typer.Option("--gpus", min=1, help="Forecast for nodes of so many GPUs, not for this machine.", show_default=False),
]
GpuMemoryOption: TypeAlias = Annotated[
    str | None, typer.Option("--gpu-memory", metavar="SIZE", help="Of each of these GPUs, such as '80 GB'.", show_default=False)
]
NodesOption: TypeAlias = Annotated[
    int | None, typer.Option("--nodes", min=1, help="So many such nodes; 1 if not given.", show_default=False)
]
RamOption: TypeAlias = Annotated[
    str | None, typer.Option("--ram", metavar="SIZE", help="Memory of each of these nodes, such as '1 TB'.", show_default=False)
]
DiskOption: TypeAlias = Annotated[
    str | None, typer.Option("--disk", metavar="SIZE", help="Room on the fastest disk of each node.", show_default=False)
]

_CORES_A_GPU = 8
"""Of nodes that are only thought of: enough for one rank and its readers."""


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    site: SiteOption = None,
    workers: WorkersOption = None,
    fresh: FreshOption = False,
    gpus: GpusOption = None,
    gpu_memory: GpuMemoryOption = None,
    nodes: NodesOption = None,
    ram: RamOption = None,
    disk: DiskOption = None,
) -> None:
    """Show what a run of RECIPE would do here, and why it could not start, with exit code 2; builds nothing.

    With --gpus, --gpu-memory and --ram: what it would do on machines that are not here.
    """
    from outgrow.cluster.inventory import take_inventory
    from outgrow.cluster.plan import render
    from outgrow.cluster.ray_cluster import announce, locate
    from outgrow.streaming.build import find

    opened = open_recipe(recipe, overrides, site)
    if workers is not None:
        opened = opened.with_site(workers=workers)
    elsewhere = _elsewhere(gpus, gpu_memory, nodes, ram, disk)
    if elsewhere is not None:
        _plan_elsewhere(opened, elsewhere, workers)
        return
    target = locate(opened.site.cluster)
    card = find(opened.recipe, opened.site)
    made = plan_run(opened, take_inventory([Path(opened.site.cache)]), card, target, fresh=fresh)
    typer.echo(announce(target))
    typer.echo(render(made))
    if made.refusals:
        raise typer.Exit(2)


@dataclass(frozen=True, kw_only=True)
class _Elsewhere:
    """Machines that are only thought of: sizes in bytes, of each GPU and of each node."""

    gpus: int
    gpu_bytes: int
    nodes: int
    memory_bytes: int
    disk_bytes: int | None

    def __str__(self) -> str:
        from outgrow.cluster.sizes import size

        disk = f", {size(self.disk_bytes)} of disk" if self.disk_bytes is not None else ""
        return f"{self.nodes} node(s) of {self.gpus} x {size(self.gpu_bytes)}, {size(self.memory_bytes)} of memory{disk}"


def _elsewhere(
    gpus: int | None, gpu_memory: str | None, nodes: int | None, ram: str | None, disk: str | None
) -> _Elsewhere | None:
    """The machines that the options describe; None where none is given. Raises ``PlanError`` where they do not suffice."""
    from outgrow.errors import PlanError
    from outgrow.recipes.schema.sizes import parse_size

    if all(option is None for option in (gpus, gpu_memory, nodes, ram, disk)):
        return None
    if gpus is None or gpu_memory is None or ram is None:
        raise PlanError(
            "other machines are described by --gpus, --gpu-memory and --ram together; --nodes and --disk may be added",
            hint="--gpus 8 --gpu-memory '80 GB' --ram '2 TB'",
        )

    def parsed(option: str, text: str) -> int:
        try:
            return parse_size(text)
        except ValueError as error:
            raise PlanError(str(error), where=option) from None

    return _Elsewhere(
        gpus=gpus,
        gpu_bytes=parsed("--gpu-memory", gpu_memory),
        nodes=nodes or 1,
        memory_bytes=parsed("--ram", ram),
        disk_bytes=None if disk is None else parsed("--disk", disk),
    )


def _plan_elsewhere(opened: Opened, machines: _Elsewhere, workers: int | None) -> None:
    """Prints the plan on machines that are not here; nothing of this machine is looked at but the recipe's folders."""
    from outgrow.cluster.plan import make_plan, render
    from outgrow.contracts import Gpu, Inventory
    from outgrow.recipes.schema.tiers import Tier
    from outgrow.streaming.build import find
    from outgrow.trainers.models.build import facts

    count = machines.gpus * machines.nodes
    card = Gpu(index=0, name="", memory_bytes=machines.gpu_bytes, compute_capability="")
    inventory = Inventory(
        hostname="elsewhere",
        cores=_CORES_A_GPU * count,
        memory_bytes=machines.memory_bytes * machines.nodes,
        gpus=(card,) * count,
        disks=(),
        nodes=machines.nodes,
    )
    there = opened.with_site(device="cuda", workers=workers or count, threads_per_worker="auto")
    if machines.disk_bytes is not None and not there.site.tiers:
        there = there.with_site(tiers=(Tier(name="disk", path="/disk"),))  # there is one, whatever it is called
    dataset = find(opened.recipe, opened.site)
    made = make_plan(
        there.recipe,
        there.site,
        inventory,
        dataset,
        facts(there.recipe, there.site, dataset),
        free_bytes=machines.disk_bytes,
        environment={},
        tier_bytes=machines.disk_bytes,
        one_disk=True,
    )
    typer.echo(f"a forecast for {machines}; nothing can be started from here")
    typer.echo(render(made, elsewhere=True))
    if made.refusals:
        raise typer.Exit(2)


def plan_run(opened: Opened, inventory: Inventory, card: DatasetCard | None, target: Target, *, fresh: bool) -> Plan:
    """The plan of a run that goes to ``target``; ``inventory`` is of the machines that it has."""
    from outgrow.cluster.plan import make_plan, resolve_ranks
    from outgrow.cluster.ray_environment import driver_environment
    from outgrow.monitoring.trackers import check_trackers, tracker_environment
    from outgrow.trainers.models.build import facts
    from outgrow.trainers.preflight import obstacles
    from outgrow.trainers.schedule import learning_rate

    learning_rate(opened.recipe, 0, 1)  # a custom schedule that cannot be called is refused here
    check_trackers(opened.recipe)
    if card is not None:
        _check_tokenizer(opened, card)
    model = facts(opened.recipe, opened.site, card)
    run = _taken_up(opened, card, fresh=fresh)  # after all that is wrong with the recipe by itself
    embedded = target.address is None
    environment = driver_environment(opened.site.cluster.token_file, embedded=embedded, environment=os.environ)
    return make_plan(
        opened.recipe,
        opened.site,
        inventory,
        card,
        model,
        free_bytes=_room(opened, run),
        environment=environment | tracker_environment(opened.recipe.logging.trackers),
        tier_bytes=_tier_room(opened.site) if embedded else None,
        one_disk=embedded and _is_one_disk(opened.site),
        cluster=target.address,
        reading=_reading(opened, card) if card is not None and embedded else None,
        met=obstacles(opened.recipe, opened.site, card, resolve_ranks(opened.site, inventory).device, run) if embedded else (),
    )


def _tier_room(site: Site) -> int | None:
    """Bytes that may still be put on this machine's first tier; None without tiers."""
    if not site.tiers:
        return None
    from outgrow.storage import Storage

    first = site.tiers[0]
    free = max(0, (Storage(first.path).free_bytes() or 0) - first.reserve_bytes)
    return free if first.capacity_bytes is None else min(free, first.capacity_bytes)


def _is_one_disk(site: Site) -> bool:
    """Whether the storage of runs and the first tier are on one disk of this machine."""
    from outgrow.storage import Storage, nearest_folder

    storage = site.open_storage()
    if not site.tiers or not storage.is_local:
        return False
    folders = (Path(root.path("")) for root in (storage, Storage(site.tiers[0].path)))
    return len({nearest_folder(folder).stat().st_dev for folder in folders}) == 1


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


def _taken_up(opened: Opened, card: DatasetCard | None, *, fresh: bool) -> str | None:
    """The folder of the run that would be taken up; None for a new one.

    Raises ``RunError`` where the name is already that of a run that learns something else.
    """
    from outgrow.cluster.runs import choose

    if card is None:
        return None
    run, stored = choose(opened.site.open_storage(), opened.recipe, card.data_fingerprint, fresh=fresh)
    return run.folder if stored is not None else None


def _room(opened: Opened, run: str | None) -> int | None:
    """Bytes that the storage has for a run: free ones, and those of the checkpoints it will replace; None for a bucket."""
    from outgrow.trainers.checkpoint.catalog import list_checkpoints

    storage = opened.site.open_storage()
    free = storage.free_bytes()
    if free is None or run is None:
        return free
    return free + sum(checkpoint.bytes for checkpoint in list_checkpoints(storage, run))
