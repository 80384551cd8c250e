"""How it is learned: ``run``, ``batch``, ``schedule``, ``duration``, ``validation``, ``checkpoint`` and so on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from outgrow.recipes.schema.section import Custom, Section

TOTAL = "total"
MetricName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,40}$")]
"""``TOTAL``, the loss over all streams that are trained on, or the name of a stream."""


class Run(Section):
    """The name of the run and the seed of everything that is drawn."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,60}$")
    """Lower-case letters, digits, ``-`` and ``_``; names the run folder."""
    seed: int = Field(ge=0, lt=2**32)
    """Seed of the weights and of the order of rows."""


class NextToken(Section):
    """Cross-entropy of the next token of the same document, normalised by the global sum of loss weights."""

    kind: Literal["next_token"] = "next_token"


class BatchSize(Section):
    """The global batch: the same at any number of ranks."""

    rows: int = Field(ge=1)
    """Rows an optimizer step, over all ranks."""
    micro_rows: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Rows a forward pass on one rank; ``auto`` takes all of the rank's rows at once. Fewer save memory and change nothing
    else."""


class _Warmup(Section):
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps over which the learning rate rises linearly from 0."""


class Constant(_Warmup):
    """Warm-up, then the peak learning rate."""

    kind: Literal["constant"]


class Linear(_Warmup):
    """Warm-up, then a straight line down to ``final_fraction`` of the peak."""

    kind: Literal["linear"]
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Learning rate of the last step as a share of the peak."""


class Cosine(_Warmup):
    """Warm-up, then half a cosine down to ``final_fraction`` of the peak (Loshchilov and Hutter 2017)."""

    kind: Literal["cosine"]
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step as a share of the peak."""


class WarmupStableDecay(_Warmup):
    """Warm-up, the peak, then a straight line down over the last ``decay_fraction`` of the steps (Hu et al. 2024)."""

    kind: Literal["warmup_stable_decay"]
    decay_fraction: float = Field(default=0.2, gt=0, le=1)
    """Share of all steps over which the learning rate falls."""
    final_fraction: float = Field(default=0.0, ge=0, le=1)
    """Learning rate of the last step as a share of the peak."""


class CustomSchedule(Custom):
    """A function of yours: ``factory(step=, steps=, **options)`` returns the learning rate as a share of the peak."""


Schedule = Annotated[Constant | Linear | Cosine | WarmupStableDecay | CustomSchedule, Field(discriminator="kind")]


class Duration(Section):
    """How long: exactly one of the three."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens: rounded up to whole steps of ``batch.rows`` x the length of a row (in stages, of the stage's rows)."""
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the dataset: rounded up to whole steps."""

    def rules(self) -> Iterator[tuple[str, str]]:
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        if len(given) != 1:
            yield "", f"given {' and '.join(given) or 'none'}; allowed: exactly one of steps, tokens, epochs"


class NoGuard(Section):
    """A rise is shown, and nothing is done about it."""

    kind: Literal["none"] = "none"


class _Guard(Section):
    metric: MetricName = TOTAL
    """What is watched: ``total``, the loss over the streams that are trained on, or a stream by name."""
    rise: float = Field(gt=0)
    """Nats a token above the lowest value so far (that before the first step counts) from which it is a rise."""
    patience: int = Field(default=1, ge=1)
    """So many validations in a row must show the rise."""


class StopOnRise(_Guard):
    """The run ends early, with a checkpoint, and says why."""

    kind: Literal["stop"]


class RollBackOnRise(_Guard):
    """The run goes back to the checkpoint with the lowest value, does the steps after it again, on the same rows at a lower
    learning rate, and ends early where that does not help."""

    kind: Literal["roll_back"]
    factor: float = Field(default=0.5, gt=0, lt=1)
    """What the learning rate is multiplied by from there on, each time."""
    times: int = Field(default=2, ge=1)
    """So often at most; the next rise ends the run."""


Guard = Annotated[NoGuard | StopOnRise | RollBackOnRise, Field(discriminator="kind")]


class Validation(Section):
    """Loss on the held-out documents: per stream, and over the streams that are trained on."""

    before: bool = True
    """Also before the first step: what a rise is measured from."""
    every_steps: int = Field(default=500, ge=0)
    """Optimizer steps between validations, and always one after the last step; 0 for the last alone."""
    max_rows: int = Field(default=0, ge=0)
    """At most this many rows of each stream, the same ones every time; 0 for all."""
    prompts: tuple[str, ...] = ()
    """Texts that the model continues at every validation, greedily, to be read in the report."""
    prompt_tokens: int = Field(default=48, ge=1, le=1024)
    """Tokens that each is continued by."""
    on_rise: Guard = NoGuard()
    """What a run does whose validation loss rises."""

    def rules(self) -> Iterator[tuple[str, str]]:
        if not isinstance(self.on_rise, NoGuard) and not self.every_steps:
            yield "every_steps", "0 validates after the last step alone, and on_rise needs validations before it; raise it"


class Checkpoint(Section):
    """When to save and what to keep. The newest and the last step are always kept."""

    every_steps: int = Field(default=500, ge=1)
    """Optimizer steps between checkpoints, and always one after the last step."""
    keep_newest: int = Field(default=2, ge=1)
    """This many of the newest committed checkpoints are kept."""
    keep_best: int = Field(default=1, ge=0)
    """This many more are kept: those with the lowest validation loss at their step."""
    best_by: MetricName = TOTAL
    """The validation loss that they are compared by: ``total``, over the streams that are trained on, or a stream by name."""


Tracker = Literal["tensorboard", "mlflow", "wandb"]


class Logging(Section):
    """What is written down along the way."""

    every_steps: int = Field(default=10, ge=1)
    """Optimizer steps between logged records; reading a loss costs one device synchronisation."""
    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Who is told beside ``events.jsonl``, from which each can be rebuilt: ``tensorboard`` (files in the run folder),
    ``mlflow``, ``wandb`` (both offline, into the run folder)."""


class Profile(Section):
    """A window of steps that is looked at closely; the files go to ``profiles/`` of the run folder."""

    start_step: int = Field(default=10, ge=1)
    """The first optimizer step of the window, counted from 1 in each run."""
    steps: int = Field(default=0, ge=0, le=100)
    """Length of the window; 0 profiles nothing."""
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """Ranks that are profiled."""
    memory: bool = False
    """Also a history of the device's allocations, as a page to open in a browser; on CUDA alone."""


Precision = Literal["fp32", "fp64", "bf16"]
