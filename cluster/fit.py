"""Whether a run's memory fits the machines, and the nearest change that would. Pure: decisions on a forecast and on sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import ceil
from typing import Any, TypeAlias

from outgrow.cluster.sizes import size
from outgrow.contracts import Forecast, Inventory, ModelFacts, Refusal
from outgrow.errors import PlanError
from outgrow.recipes import combinations
from outgrow.recipes import layout as layouts
from outgrow.recipes.memory import forecast
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.adapter import NoAdapter
from outgrow.recipes.schema.model import FolderModel
from outgrow.recipes.schema.optimizer import AdamW
from outgrow.recipes.schema.parallel import AutoParallel
from outgrow.recipes.schema.speed import RecomputeBlocks, WholeLogits

Change: TypeAlias = tuple[str, Mapping[str, Any]]
"""What to write after the recipe's file, and the sections that it changes."""

_MOST_CARDS = 1024
_SYSTEM_BYTES = 4 * 10**9
"""Of a node's memory, for the system, Ray and what else runs there; a twentieth of a smaller memory than 80 GB."""
_OFFLOAD_FSDP2: Change = ("parallel='{kind: fsdp2, offload: cpu}'", {"parallel": {"kind": "fsdp2", "offload": "cpu"}})


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What each of ``nodes`` alike has: ``device_bytes`` on each GPU (0 on a CPU), memory, room on its first tier (None where
    nobody knows). Without ``has_tier`` nothing can be offloaded to a disk."""

    device: str
    workers: int
    nodes: int
    device_bytes: int
    memory_bytes: int
    disk_bytes: int | None
    has_tier: bool = True

    @classmethod
    def of(cls, inventory: Inventory, device: str, workers: int, disk_bytes: int | None, *, has_tier: bool) -> Machine:
        """The machine that ``inventory`` found, its smallest GPU standing for all."""
        smallest = min((gpu.memory_bytes for gpu in inventory.gpus), default=0)
        return cls(
            device=device,
            workers=workers,
            nodes=inventory.nodes,
            device_bytes=smallest if device == "cuda" else 0,
            memory_bytes=inventory.memory_bytes // inventory.nodes,
            disk_bytes=disk_bytes,
            has_tier=has_tier,
        )

    @property
    def left_to_system(self) -> int:
        """Bytes of a node's memory that no run is planned into."""
        return min(_SYSTEM_BYTES, self.memory_bytes // 20)

    @property
    def local_workers(self) -> int:
        """Ranks on a node, at most."""
        return -(-self.workers // self.nodes)


def memory_refusals(recipe: Recipe, facts: ModelFacts, machine: Machine) -> list[Refusal]:
    """One refusal of all that is too small, device, memory or disk, with the nearest changes that would fit; else none."""
    foreseen = _foresee(recipe, facts, machine)
    lacking = _lacking(foreseen, machine) if foreseen else []
    if not lacking:
        return []
    asked, available = ("; and ".join(parts) for parts in zip(*lacking, strict=True))
    return [Refusal(asked=asked, available=available, nearest=_nearest(recipe, facts, machine))]


def node_bytes(foreseen: Forecast, device: str, local_workers: int) -> int:
    """Bytes of a node's memory; on a CPU what would lie on devices lies there too."""
    own = sum(foreseen.host.values())
    return own if device == "cuda" else own + local_workers * sum(foreseen.device.values())


def _foresee(recipe: Recipe, facts: ModelFacts, machine: Machine) -> Forecast | None:
    layout = layouts.resolve(recipe, machine.workers, machine.local_workers)
    return forecast(recipe, facts, layout, machine.local_workers, machine.device)


def _lacking(foreseen: Forecast, machine: Machine) -> list[tuple[str, str]]:
    """What is asked of each place that is too small, and what there is."""
    lacking = []
    on_device, on_disk = sum(foreseen.device.values()), sum(foreseen.disk.values())
    in_memory = node_bytes(foreseen, machine.device, machine.local_workers)
    if machine.device == "cuda" and on_device > machine.device_bytes:
        lacking.append((f"{size(on_device)} on a GPU ({terms(foreseen.device)})", f"{size(machine.device_bytes)} on each"))
    if in_memory > machine.memory_bytes - machine.left_to_system:
        there = f"{size(machine.memory_bytes)}, of which {size(machine.left_to_system)} are left to the system"
        parts = terms(foreseen.host)
        if machine.device != "cuda":
            parts = f"{parts}; and of each of {machine.local_workers} rank(s): {terms(foreseen.device)}"
        lacking.append((f"{size(in_memory)} of memory on a node ({parts})", there))
    if machine.disk_bytes is not None and on_disk > machine.disk_bytes:
        there = f"{size(machine.disk_bytes)} on the first tier"
        lacking.append((f"{size(on_disk)} on the first tier of a node ({terms(foreseen.disk)})", there))
    return lacking


def terms(parts: Mapping[str, int]) -> str:
    """Terms of a forecast, the largest first; those below a hundredth of the whole are left out."""
    least = sum(parts.values()) / 100
    shown = sorted((item for item in parts.items() if item[1] >= least), key=lambda item: -item[1])
    return ", ".join(f"{name} {size(value)}" for name, value in shown)


# --- the nearest that fits --------------------------------------------------------------------------------------------


def _nearest(recipe: Recipe, facts: ModelFacts, machine: Machine) -> str:
    """Changes each of which makes the recipe fit, apart by ``; or``: overrides to add, GPUs to take, or room on a disk.

    Changes of where numbers lie come first, as many as it takes; beneath them what changes more: the first that trains the
    same, else a smaller method, and offload.
    """
    known = _broken(recipe, facts, machine)
    asked, sections = list[str](), dict[str, Any]()
    room = _disk_enough(recipe, facts, machine, known)
    for text, changes in _free_changes(recipe) if not room else ():
        changed = _with(recipe, sections | dict(changes))
        if not _goes_together(changed, facts, machine, known):
            continue
        asked.append(text)
        sections |= changes
        if _fits(changed, facts, machine, known):
            return f"add {' '.join(asked)}"

    def first(changes: Iterable[Change]) -> list[str]:
        fitting = (text for text, changed in changes if _fits(_with(recipe, sections | dict(changed)), facts, machine, known))
        return [f"add {' '.join([*asked, text])}" for text in islice(fitting, 1)]

    offers = first(_same_model(recipe)) or [*first(_smaller(recipe)), *first(_offloads(machine))]
    cards, parallel = _cards_enough(_with(recipe, sections), facts, machine, known)
    if cards:
        added = [*asked, *parallel]
        offers.append(f"add {' '.join(added)} and take {cards} such GPUs" if added else f"take {cards} such GPUs")
    if room:
        offers.append(f"have {ceil(room / 10**9)} GB free on the first tier beyond its reserve, and as much capacity")
    return "; or ".join(offers) or "no change of parallel, optimizer, adapter or activations fits; take a smaller model"


def _free_changes(recipe: Recipe) -> Iterator[Change]:
    policy = recipe.activation_checkpointing
    if not (isinstance(policy, RecomputeBlocks) and policy.every == 1):
        yield "activation_checkpointing=full", {"activation_checkpointing": {"kind": "full"}}
    if isinstance(recipe.cross_entropy, WholeLogits):
        yield "cross_entropy=chunked", {"cross_entropy": {"kind": "chunked"}}
    if recipe.batch.micro_rows != 1:
        yield "batch.micro_rows=1", {"batch": {"rows": recipe.batch.rows, "micro_rows": 1}}


def _same_model(recipe: Recipe) -> Iterator[Change]:
    yield "parallel=fsdp2", {"parallel": {"kind": "fsdp2"}}
    if isinstance(recipe.optimizer, AdamW):
        section = recipe.optimizer.model_dump(mode="json") | {"kind": "adamw_8bit"}
        yield "optimizer.kind=adamw_8bit", {"optimizer": section}
        yield "parallel=fsdp2 optimizer.kind=adamw_8bit", {"parallel": {"kind": "fsdp2"}, "optimizer": section}
    yield _OFFLOAD_FSDP2


def _smaller(recipe: Recipe) -> Iterator[Change]:
    """QLoRA, with the engine that was asked for if it can, else with the one that follows from the machines."""
    if not isinstance(recipe.model, FolderModel):
        return
    if isinstance(recipe.adapter, NoAdapter):
        text, changes = "adapter='{kind: lora, base: nf4}'", {"adapter": {"kind": "lora", "base": "nf4"}}
    elif recipe.adapter.base == "nf4":
        return
    else:
        text, changes = "adapter.base=nf4", {"adapter": recipe.adapter.model_dump(mode="json") | {"base": "nf4"}}
    yield text, changes
    if not isinstance(recipe.parallel, AutoParallel):
        yield f"{text} parallel=auto", changes | {"parallel": {"kind": "auto"}}


def _offloads(machine: Machine) -> Iterator[Change]:
    """DeepSpeed's, to memory and, where there is a tier, to disk."""
    for place in ("cpu", "nvme") if machine.has_tier else ("cpu",):
        section = {"kind": "zero", "stage": 3, "offload_optimizer": place}
        yield f"parallel='{{kind: zero, offload_optimizer: {place}}}'", {"parallel": section}
    if machine.has_tier:
        whole = {"kind": "zero", "stage": 3, "offload_optimizer": "nvme", "offload_parameters": "nvme"}
        yield "parallel='{kind: zero, offload_optimizer: nvme, offload_parameters: nvme}'", {"parallel": whole}


def _with(recipe: Recipe, sections: Mapping[str, Any]) -> Recipe:
    return Recipe.model_validate(recipe.to_dict() | dict(sections))


def _facts_of(recipe: Recipe, facts: ModelFacts) -> ModelFacts:
    """The facts with every linear layer of the blocks adapted, where a change has brought an adapter."""
    brought = not isinstance(recipe.adapter, NoAdapter) and not facts.adapted
    return replace(facts, adapted=facts.linear) if brought else facts


def _broken(recipe: Recipe, facts: ModelFacts, machine: Machine) -> list[Refusal]:
    """The rules of what goes together that the recipe breaks there."""
    return combinations.refusals(recipe, machine.device, shares_experts=machine.workers > 1 and facts.has_mixtures)


def _goes_together(recipe: Recipe, facts: ModelFacts, machine: Machine, known: Sequence[Refusal]) -> bool:
    """Whether the recipe breaks no rule but those that are ``known``, each of which is a refusal of its own already."""
    return all(refusal in known for refusal in _broken(recipe, facts, machine))


def _fits(recipe: Recipe, facts: ModelFacts, machine: Machine, known: Sequence[Refusal]) -> bool:
    if not _goes_together(recipe, facts, machine, known):
        return False
    try:
        foreseen = _foresee(recipe, _facts_of(recipe, facts), machine)
    except PlanError:
        return False
    return foreseen is not None and not _lacking(foreseen, machine)


def _disk_enough(recipe: Recipe, facts: ModelFacts, machine: Machine, known: Sequence[Refusal]) -> int:
    """Bytes of the first tier that the recipe asks for where these alone are lacking; else 0."""
    foreseen = _foresee(recipe, facts, machine)
    lacks_disk_alone = foreseen is not None and _fits(recipe, facts, replace(machine, disk_bytes=None), known)
    return sum(foreseen.disk.values()) if foreseen is not None and lacks_disk_alone else 0


def _cards_enough(recipe: Recipe, facts: ModelFacts, machine: Machine, known: Sequence[Refusal]) -> tuple[int, tuple[str, ...]]:
    """The fewest GPUs that hold the recipe, in nodes of as many as there are now, or of up to 8, and what to add to it there:
    nothing, or FSDP2 where that needs fewer, as offload takes memory that does not grow with them; 0 where no number does."""
    if machine.device != "cuda":
        return 0, ()
    node = max(8, machine.local_workers)
    sharded = _with(recipe, {"parallel": {"kind": "fsdp2"}})
    for cards in chain(range(machine.workers + 1, node + 1), range(2 * node, _MOST_CARDS + 1, node)):
        larger = replace(machine, workers=cards, nodes=-(-cards // node))
        if cards > machine.workers and _fits(recipe, facts, larger, known):
            return cards, ()
        if cards > machine.workers and _fits(sharded, facts, larger, known):
            return cards, ("parallel=fsdp2",)
    return 0, ()
