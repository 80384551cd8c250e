"""``Recipe``: all that decides what is learned. No path of a machine, host, card or number of ranks in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from outgrow.recipes.schema import speed, training
from outgrow.recipes.schema.adapter import Adapter, NoAdapter
from outgrow.recipes.schema.data import Data
from outgrow.recipes.schema.model import ArchitectureModel, Model
from outgrow.recipes.schema.optimizer import Optimizer
from outgrow.recipes.schema.parallel import AutoParallel, Parallel
from outgrow.recipes.schema.section import Section


class Recipe(Section):
    """A whole recipe. ``to_dict`` gives what ``Recipe.model_validate`` takes."""

    schema_version: Literal[1] = Field(alias="schema")
    """Version of this format; 1."""
    run: training.Run
    """Name and seed."""
    model: Model
    """What is trained."""
    adapter: Adapter = NoAdapter()
    """What of the model is trained: all of it, or LoRA beside frozen layers."""
    data: Data
    """What it is trained on."""
    objective: training.NextToken = training.NextToken()
    """What is minimised."""
    batch: training.BatchSize
    """Rows an optimizer step."""
    duration: training.Duration
    """How long."""
    optimizer: Optimizer
    """How parameters move."""
    schedule: training.Schedule = training.Cosine(kind="cosine")
    """The learning rate over time."""
    precision: training.Precision = "bf16"
    """``bf16``: parameters and optimizer in float32, compute in bfloat16, gradients reduced in float32; ``fp32``; ``fp64`` to
    tell bugs from rounding."""
    attention: speed.Attention = "auto"
    """How attention within packed rows is computed; ``auto``: the fastest that the model, the device and what is installed
    allow. ``sdpa`` and ``eager`` run anywhere."""
    cross_entropy: speed.CrossEntropy = speed.WholeLogits()
    """How the loss is computed from the last hidden states."""
    compile: speed.Compile = "none"
    """``blocks``: each transformer block is compiled by itself (``torch.compile``); the first step then takes longer."""
    activation_checkpointing: speed.ActivationCheckpointing = speed.KeepAll()
    """What the backward pass computes again: nothing, whole blocks, or all but the dear operations."""
    activation_offload: bool = False
    """Keep what blocks keep for the backward pass in the node's memory instead of the device's."""
    deterministic: bool = True
    """Deterministic kernels alone: the same run twice is bit-identical. False may be faster on a GPU."""
    validation: training.Validation = training.Validation()
    """When and how much."""
    checkpoint: training.Checkpoint = training.Checkpoint()
    """When to save and what to keep."""
    logging: training.Logging = training.Logging()
    """What is written down."""
    profile: training.Profile = training.Profile()
    """What is looked at closely, and when."""
    parallel: Parallel = AutoParallel()
    """How ranks share the model; ``auto`` unless you insist."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if isinstance(self.batch.micro_rows, int) and self.batch.micro_rows > self.batch.rows:
            yield "batch.micro_rows", f"{self.batch.micro_rows} is more than batch.rows ({self.batch.rows}); lower it"
        if self.data.stages and self.duration.epochs is not None:
            yield "duration.epochs", "a run in stages has no epochs; give duration.tokens or duration.steps"
        if isinstance(self.model, ArchitectureModel) and "vocab_size" in self.model.config:
            yield "model.config.vocab_size", "remove it; the vocabulary size comes from data.tokenizer"
        yield from self._metric_rules()

    def _metric_rules(self) -> Iterator[tuple[str, str]]:
        guard, best_by = self.validation.on_rise, self.checkpoint.best_by
        named = {"checkpoint.best_by": best_by}
        if not isinstance(guard, training.NoGuard):
            named["validation.on_rise.metric"] = guard.metric
        streams = [stream.name for stream in self.data.streams]
        held_out = self.data.validation_fraction or any(stream.use == "validation" for stream in self.data.streams)
        if not held_out and not isinstance(guard, training.NoGuard):
            yield "validation.on_rise", "no document is held out to see a rise by; raise data.validation_fraction"
        for key, name in named.items():
            if name == training.TOTAL and name in streams:
                yield key, f"'{name}' is the loss over all streams that are trained on; give the stream another name"
            elif name not in (training.TOTAL, *streams):
                yield key, f"there is no stream '{name}'; allowed: {', '.join([training.TOTAL, *streams])}"
        if not isinstance(guard, training.RollBackOnRise):
            return
        if best_by != guard.metric:
            yield (
                "checkpoint.best_by",
                (
                    f"validation.on_rise goes back to the best checkpoint by {guard.metric}, and those by {best_by} are kept; "
                    f"set it to {guard.metric}"
                ),
            )
        if not self.checkpoint.keep_best:
            yield "checkpoint.keep_best", "validation.on_rise goes back to the best checkpoint, and none is kept; set it to 1"
        if self.validation.every_steps % self.checkpoint.every_steps:
            yield (
                "validation.every_steps",
                (
                    f"{self.validation.every_steps} is no multiple of checkpoint.every_steps ({self.checkpoint.every_steps}), "
                    "so the lowest loss may have no checkpoint that validation.on_rise could go back to; make it one"
                ),
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, every default filled in."""
        return self.model_dump(mode="json", by_alias=True)
