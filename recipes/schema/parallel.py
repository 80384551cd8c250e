"""``parallel``: how ranks share the model. The rows and the loss are the same in every kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from outgrow.recipes.schema.deepspeed_keys import decided_keys, faults
from outgrow.recipes.schema.section import Section


class AutoParallel(Section):
    """Worked out from the machines: ``plain`` on one rank, FSDP2 sharded over all ranks beyond."""

    kind: Literal["auto"] = "auto"


class Ddp(Section):
    """The whole model on every rank; gradients are summed over the ranks once a step, while the backward pass still runs."""

    kind: Literal["ddp"]


class Fsdp2(Section):
    """FSDP2 (``fully_shard`` on each block, the embedding, the head and the root), on one rank too."""

    kind: Literal["fsdp2"]
    shard: Literal["all", "node"] | Annotated[int, Field(ge=1)] = "all"
    """Ranks that share one copy of the model: ``all``; ``node``: shard within a node and replicate across nodes (HSDP); or a
    number that divides the ranks."""
    reshard_after_forward: bool = True
    """Free the gathered parameters of a block after its forward pass; false keeps them, faster and larger."""
    prefetch_blocks: int = Field(default=1, ge=0, le=8)
    """Blocks whose parameters are gathered ahead of the one that computes, in both passes; 0 gathers each when it is needed."""
    reduce_gradients: Literal["each_micro_batch", "last_micro_batch"] = "each_micro_batch"
    """When gradients are reduce-scattered: after each micro-batch, which holds a shard of them; or once a step, which
    communicates less and holds all gradients of the model on every rank."""
    offload: Literal["none", "cpu"] = "none"
    """Where parameters, gradients and optimizer states lie: on the device, or in the node's memory, where the optimizer then
    steps."""


class Zero(Section):
    """DeepSpeed ZeRO: stage 1 shards optimizer states, 2 gradients too, 3 parameters too; with offload to memory or disk."""

    kind: Literal["zero"]
    stage: Literal[1, 2, 3] = 3
    """What is sharded over all ranks."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer's states lie and step: the device, the node's memory, or the first tier of the site."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where the shards of parameters lie between uses; stage 3 alone."""
    deepspeed: dict[str, Any] = {}
    """Keys of DeepSpeed's own configuration, laid over the one that follows from this recipe; ``plan`` shows the result."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if self.offload_parameters != "none" and self.stage != 3:
            yield "offload_parameters", f"stage {self.stage} keeps whole parameters on the device; set stage: 3, or none here"
        if self.offload_parameters == "nvme" and self.offload_optimizer != "nvme":
            yield "offload_optimizer", "its states are larger than the parameters that are on disk; set nvme here too"
        if self.stage != 3 and self.offload_optimizer == "nvme":
            yield "offload_optimizer", f"stage {self.stage} offloads to cpu alone; set stage: 3, or cpu here"
        for key, instead in decided_keys(self.deepspeed):
            yield "deepspeed", f"{key} is decided by the recipe; set {instead}"
        for fault in faults(self.deepspeed):
            yield "deepspeed", fault


Parallel = Annotated[AutoParallel | Ddp | Fsdp2 | Zero, Field(discriminator="kind")]
