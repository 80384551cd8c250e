"""A model of random weights in an engine of outgrow, and how fast it trains on how much memory.

Steps are those of the loop: micro-batches through ``accumulate``, then ``finish``, ``apply`` and the watch over the gradient.
No number is read from the device within them.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from random_weights import RandomWeights

from outgrow.torchvision import ensure_importable

ensure_importable()

from transformers import LlamaConfig  # noqa: E402

from outgrow.contracts import Batch  # noqa: E402
from outgrow.recipes.layout import resolve  # noqa: E402
from outgrow.recipes.schema import Recipe  # noqa: E402
from outgrow.recipes.schema.adapter import Lora  # noqa: E402
from outgrow.trainers.adapters.lora import adapt  # noqa: E402
from outgrow.trainers.adapters.sources import AdaptedWeights  # noqa: E402
from outgrow.trainers.ceilings import arithmetic_of, vendor_flops  # noqa: E402
from outgrow.trainers.engines import Engine, make_engine, unmarked  # noqa: E402
from outgrow.trainers.finite import FiniteWatch  # noqa: E402
from outgrow.trainers.models.build import checked_config, meta_model  # noqa: E402
from outgrow.trainers.regions import TensorSource  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RATE = 1e-5


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    groups: int
    vocabulary: int
    tied: bool = False

    def config(self, length: int) -> LlamaConfig:
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            max_position_embeddings=length,
            tie_word_embeddings=self.tied,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=0,
            use_cache=False,
        )
        return checked_config(config, self.name)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a trial came to. ``mfu`` is of the vendor's dense bfloat16 figure, None where that is not known."""

    tokens_per_s: float
    mfu: float | None
    peak_bytes: int
    reserved_bytes: int
    loss: float


def recipe_of(length: int, rows: int, micro_rows: int, **sections: Any) -> Recipe:
    """A recipe of dense rows; ``sections`` override it."""
    return Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "gpu", "seed": 1},
            "model": {"kind": "folder", "path": "none"},
            "data": {
                "sequence_length": length,
                "tokenizer": {"kind": "folder", "path": "none"},
                "streams": [{"name": "none", "source": {"kind": "text", "path": "none"}}],
            },
            "batch": {"rows": rows, "micro_rows": micro_rows},
            "duration": {"steps": 1000},
            "optimizer": {"kind": "adamw", "learning_rate": RATE},
            "deterministic": False,
            **sections,
        }
    )


class Trial:
    """A model in an engine on one device, which took ``seconds`` and at most ``peak_bytes`` to make."""

    def __init__(self, shape: Shape, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        torch.use_deterministic_algorithms(recipe.deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # as trainers/bring_up.py has it for a run
        self._reset_peak()
        start = time.perf_counter()
        self._layout = resolve(recipe, 1, 1)
        self._length = recipe.data.sequence_length
        model = meta_model(shape.config(self._length), recipe.precision)
        adapt(model, recipe)
        self.flops_per_token = arithmetic_of(model).flops_per_token(self._length)
        self.engine: Engine = self._filled(model)
        wait(device)
        self.seconds, self.peak_bytes = time.perf_counter() - start, _peak(device)[0]
        self._watch = FiniteWatch(device)
        self._steps = 0
        self._batches = list(_batches(shape.vocabulary, recipe.batch.rows, self._layout.micro_rows, self._length))

    def _filled(self, model: PreTrainedModel) -> Engine:
        """An engine around ``model``, which has been adapted, with weights drawn on the device."""
        recipe, device = self.recipe, self.device
        adapter = recipe.adapter
        if isinstance(adapter, Lora) and adapter.base == "nf4":
            # Here alone: bitsandbytes need not be there for the rest.
            from packed_weights import PackedRandomWeights

            from outgrow.trainers.adapters.nf4 import attach_quant_states

            packed = PackedRandomWeights(model, device)
            engine = make_engine(self._layout, recipe, model, device)
            engine.load_model(AdaptedWeights(packed, recipe, model))
            attach_quant_states(model, packed, device)
            return engine
        base = RandomWeights(model, device)
        source: TensorSource = AdaptedWeights(base, recipe, model) if isinstance(adapter, Lora) else base
        engine = make_engine(self._layout, recipe, model, device)
        engine.load_model(source)
        return engine

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.recipe.batch.rows * self._length

    def step(self) -> torch.Tensor:
        """The loss of one step, on the device."""
        for batch in self._batches:
            self.engine.accumulate(batch, float(self.tokens), unmarked)
        sums = self.engine.finish()
        self.engine.apply(RATE)
        self._steps += 1
        self._watch.see(self._steps, sums.grad_norm)
        return sums.loss

    def measure(self, steps: int, warm_up: int = 2) -> Measured:
        """Speed and memory of ``steps`` steps after ``warm_up``; the peak is of all of them, making the optimizer included."""
        self._reset_peak()
        for _ in range(warm_up):
            loss = self.step()
        wait(self.device)
        start = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        wait(self.device)
        rate = steps * self.tokens / (time.perf_counter() - start)
        if not math.isfinite(float(loss)):
            raise ArithmeticError(f"the loss is {float(loss)}")
        peak, reserved = _peak(self.device)
        return Measured(
            tokens_per_s=rate,
            mfu=share_of_peak(rate * self.flops_per_token, self.device),
            peak_bytes=peak,
            reserved_bytes=reserved,
            loss=float(loss),
        )

    def drop(self) -> None:
        """Let go of everything: who made the trial still has it, by the ``as`` of its ``with``."""
        vars(self).clear()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)


@contextmanager
def trial(shape: Shape, recipe: Recipe, device: torch.device) -> Iterator[Trial]:
    """A trial on a device that has been given back what came before; its own memory is given back at the end.

    After an error that is so only once the error is dealt with, whose traceback holds the model: hence the giving back before.
    """
    release(device)
    made = Trial(shape, recipe, device)
    try:
        yield made
    finally:
        made.drop()
        release(device)


def release(device: torch.device) -> None:
    """Give back what nobody holds any more: cycles of objects, as every engine is one, and graphs of compiled blocks."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda" and answers(device):
        torch.cuda.empty_cache()


def answers(device: torch.device) -> bool:
    """Whether the device still computes for this process; after some errors it never does again."""
    try:
        wait(device)
    except RuntimeError:
        return False
    return True


def share_of_peak(flops_per_s: float, device: torch.device) -> float | None:
    """Of what the vendor states for dense bfloat16 products."""
    peak = vendor_flops(device_name(device), "bf16")
    return flops_per_s / peak if peak else None


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> tuple[int, int]:
    """Bytes that tensors took at most, and that the allocator had taken for them."""
    if device.type != "cuda":
        return 0, 0
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _batches(vocabulary: int, rows: int, micro_rows: int, length: int) -> Iterator[Batch]:
    """The micro-batches of a step: rows of one document each, in host memory as a loader leaves them."""
    generator = torch.Generator().manual_seed(1)
    for start in range(0, rows, micro_rows):
        shape = (min(micro_rows, rows - start), length)
        tokens = torch.randint(vocabulary, (shape[0], length + 1), generator=generator)
        yield Batch(
            token_ids=tokens[:, :-1].contiguous(),
            targets=tokens[:, 1:].contiguous(),
            weights=torch.ones(shape),
            segments=torch.zeros(shape, dtype=torch.int32),
            positions=torch.arange(length).repeat(shape[0], 1),
            pairs=torch.full(shape, -1, dtype=torch.int32),
            row_ids=torch.arange(shape[0]),
        )


def gigabytes(num_bytes: int) -> str:
    """As data sheets count: 1e9."""
    return f"{num_bytes / 1e9:.1f}"


def row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"
