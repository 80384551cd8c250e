"""The sections of ``gpu.py``: each takes a device and whether it is a dry run, and gives lines of Markdown as it measures."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from attempts import Failed, attempt, in_a_line
from training import Measured, Shape, Trial, gigabytes, recipe_of, release, row, trial, wait

from outgrow.recipes.schema import Recipe

LLAMA_8B = Shape(name="Llama-3-8B", hidden=4096, inner=14336, layers=32, heads=32, groups=8, vocabulary=128256)
LLAMA_70B = Shape(name="Llama-3-70B", hidden=8192, inner=28672, layers=80, heads=64, groups=8, vocabulary=128256)
LLAMA_1B = Shape(name="Llama-3.2-1B", hidden=2048, inner=8192, layers=16, heads=32, groups=8, vocabulary=128256, tied=True)
TOY = Shape(name="toy", hidden=64, inner=128, layers=2, heads=4, groups=2, vocabulary=512)
TOY_LENGTH = 64

FULL_RECOMPUTED = {"kind": "full"}
CHUNKED = {"kind": "chunked", "tokens": 4096}
EIGHT_BIT = {"kind": "adamw_8bit", "learning_rate": 1e-5}
SWITCHES: Mapping[str, dict[str, Any]] = {
    "loss in parts": {"cross_entropy": CHUNKED},
    "Liger's loss": {"cross_entropy": {"kind": "liger"}},
    "blocks compiled": {"compile": "blocks"},
    "attention sdpa": {"attention": "sdpa"},
    "attention flex": {"attention": "flex"},
    "attention varlen": {"attention": "varlen"},
    "attention flash_attention_2": {"attention": "flash_attention_2"},
    "blocks recomputed": {"activation_checkpointing": FULL_RECOMPUTED},
    "every second block recomputed": {"activation_checkpointing": {"kind": "full", "every": 2}},
    "cheap operations recomputed": {"activation_checkpointing": {"kind": "selective"}},
    "blocks recomputed, their inputs in host memory": {
        "activation_checkpointing": FULL_RECOMPUTED,
        "activation_offload": True,
    },
    "AdamW in 8 bits": {"optimizer": EIGHT_BIT},
    "Muon": {"optimizer": {"kind": "muon", "learning_rate": 1e-5}},
    "deterministic kernels": {"deterministic": True},
    "FSDP2 on one rank": {"parallel": {"kind": "fsdp2"}},
}
"""What a recipe may ask for, one at a time."""
BYTES_A_PARAMETER = 12
"""bfloat16 copy 2, float32 master 4, float32 gradient 4, moments in 8 bits 2."""


def pretraining(device: torch.device, dry: bool) -> Iterator[str]:
    """Continued pretraining of all of an 8B, by micro-batch and what is recomputed."""
    shape = TOY if dry else _fitting(LLAMA_8B, device)
    length, rows = (TOY_LENGTH, 4) if dry else (4096, 16)
    tried: list[tuple[int, dict[str, Any]]] = [
        (2, {"kind": "full"}),
        (2, {"kind": "selective"}),
        (4, {"kind": "full"}),
        (1, {"kind": "none"}),
    ]
    yield (
        f"{shape.name} shape, {shape.layers} layers, {length} tokens a row, {rows} rows a step, bf16 with float32 masters, "
        "AdamW with moments in 8 bits: with moments in float32 the states of 8B alone take 144 GB."
    )
    yield ""
    yield from _header("rows a micro-batch", "recomputed", "tokens/s", "MFU", "peak memory, GB", "reserved, GB")
    for micro_rows, checkpointing in tried[: 2 if dry else None]:
        recipe = recipe_of(
            length,
            rows,
            micro_rows,
            optimizer=EIGHT_BIT,
            activation_checkpointing=checkpointing,
            cross_entropy=CHUNKED,
            compile="none" if dry else "blocks",
        )
        found = _measured(shape, recipe, device, 1 if dry else 3)
        yield row([micro_rows, checkpointing["kind"], *_speed_and_memory(found)])


def qlora(device: torch.device, dry: bool) -> Iterator[str]:
    """QLoRA of a 70B of random weights, plain and on as little memory as can be."""
    shape, length = (TOY, TOY_LENGTH) if dry else (LLAMA_70B, 2048)
    lean: dict[str, Any] = {"optimizer": EIGHT_BIT, "activation_offload": device.type == "cuda"}
    yield (
        f"{shape.name} shape, 1 row of {length} tokens, NF4 with double quantisation made on the device layer by layer, rank "
        "16 on all linear layers of the blocks, blocks recomputed, bf16."
    )
    yield ""
    yield from _header("", "tokens/s", "peak memory, GB", "reserved, GB", "goal, GB", "made in, s", "peak meanwhile, GB")

    def measured(recipe: Recipe) -> tuple[Measured, str, str]:
        with trial(shape, recipe, device) as made:
            making = f"{made.seconds:.0f}", gigabytes(made.peak_bytes)
            return made.measure(1 if dry else 5), *making

    for name, sections, goal in (("plain, AdamW", {}, 46), ("activation offload, 8-bit AdamW", lean, 41)):
        recipe = recipe_of(
            length,
            1,
            1,
            adapter={"kind": "lora", "rank": 16, "targets": "all-linear", "base": "nf4"},
            activation_checkpointing=FULL_RECOMPUTED,
            cross_entropy={"kind": "chunked", "tokens": 512},
            **sections,
        )
        found = attempt(partial(measured, recipe), device)
        if isinstance(found, Failed):
            yield row([name, found.text, "", "", goal, "", ""])
            continue
        speed, seconds, peak = found
        memory = [gigabytes(speed.peak_bytes), gigabytes(speed.reserved_bytes)]
        yield row([name, f"{speed.tokens_per_s:,.0f}", *memory, goal, seconds, peak])


def trainer(device: torch.device, dry: bool) -> Iterator[str]:
    """A 1B beside transformers' Trainer, which is compiled and has its best attention; outgrow before it and after it."""
    shape, length, rows = (replace(TOY, tied=True), TOY_LENGTH, 4) if dry else (LLAMA_1B, 2048, 32)
    steps = 2 if dry else 6
    ours: list[float] = []
    theirs: list[float] = []
    yield f"{shape.name} shape, {length} tokens a row, {rows} rows a step, float32 masters and bf16 arithmetic, fused AdamW."
    yield ""
    yield from _header("", "rows a micro-batch", "tokens/s")
    for micro_rows in (2,) if dry else (8, 16, 4):
        recipe = recipe_of(length, rows, micro_rows, cross_entropy=CHUNKED, compile="none" if dry else "blocks")
        before = _measured(shape, recipe, device, steps)
        yield row(["outgrow", micro_rows, _speed(before)])
        for attention in _attentions(device):
            rate = partial(_trainer_rate, shape, length, rows, micro_rows, attention, steps, device, compiled=not dry)
            found = attempt(rate, device)
            if isinstance(found, float):
                theirs.append(found)
            text = found.text if isinstance(found, Failed) else f"{found:,.0f}"
            yield row([f"transformers' Trainer, attention {attention}", micro_rows, text])
        after = before if isinstance(before, Failed) else _measured(shape, recipe, device, steps)
        yield row(["outgrow again", micro_rows, _speed(after)])
        if isinstance(before, Measured) and isinstance(after, Measured):
            ours.append((before.tokens_per_s + after.tokens_per_s) / 2)
    yield ""
    if ours and theirs:
        yield f"outgrow / Trainer, each at its best: {max(ours) / max(theirs):.3f} (goal: 1.1)"
    else:
        yield "No ratio: one of the two was measured in no size."


def switches(device: torch.device, dry: bool) -> Iterator[str]:
    """Speed and memory of each switch of a recipe against none of them, which is measured before and after each."""
    shape, length = (TOY, TOY_LENGTH) if dry else (LLAMA_1B, 4096)
    steps = 1 if dry else 6
    yield (
        f"{shape.name} shape, 4 rows of {length} tokens a step, bf16. Ratios are to a recipe without any switch, the mean of "
        "one run before and one after."
    )
    yield ""
    yield from _header("switch", "tokens/s", "speed, ratio", "peak memory, GB", "memory, ratio")
    before = _measured(shape, recipe_of(length, 4, 4), device, steps)
    yield row(["none", *_against(before, [])])
    for name in ["loss in parts"] if dry else SWITCHES:
        found = _measured(shape, recipe_of(length, 4, 4, **SWITCHES[name]), device, steps)
        if isinstance(found, Failed):
            yield row([name, *_against(found, [])])
            continue
        after = _measured(shape, recipe_of(length, 4, 4), device, steps)
        yield row([name, *_against(found, [plain for plain in (before, after) if isinstance(plain, Measured)])])
        before = after


def syncs(device: torch.device, dry: bool) -> Iterator[str]:
    """Whether a step that is not logged waits for the device: CUDA calls that would are errors meanwhile."""
    shape, length = (TOY, TOY_LENGTH) if dry else (replace(LLAMA_1B, layers=4), 2048)
    cases: dict[str, dict[str, Any]] = {
        "full": {},
        "chunked loss, AdamW in 8 bits": {"cross_entropy": CHUNKED, "optimizer": EIGHT_BIT},
        "deterministic, chunked loss": {"deterministic": True, "cross_entropy": CHUNKED},
        "LoRA": {"adapter": {"kind": "lora"}},
        "QLoRA": {"adapter": {"kind": "lora", "base": "nf4"}},
        "FSDP2 on one rank": {"parallel": {"kind": "fsdp2"}},
    }

    def waited(recipe: Recipe) -> str:
        with trial(shape, recipe, device) as made:
            return _waits(made)

    yield from _header("", "waits for the device")
    for name, sections in cases.items():
        found = attempt(partial(waited, recipe_of(length, 4, 2, **sections)), device)
        yield row([name, found.text if isinstance(found, Failed) else found])


def _waits(made: Trial) -> str:
    """ "no", or what did."""
    for _ in range(2):
        made.step()
    wait(made.device)
    if made.device.type != "cuda":
        made.step()
        return "not asked: no GPU"
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.step()
    except RuntimeError as error:
        traceback.print_exc(file=sys.stderr)  # where
        return in_a_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def _fitting(shape: Shape, device: torch.device) -> Shape:
    """``shape`` with as many layers as fit, with an eighth of the memory left for activations."""
    room = 0.875 * torch.cuda.get_device_properties(device).total_memory
    outer = 2 * shape.vocabulary * shape.hidden
    layer = shape.hidden * (2 * shape.hidden + 2 * shape.hidden * shape.groups // shape.heads + 3 * shape.inner)
    return replace(shape, layers=min(shape.layers, int((room / BYTES_A_PARAMETER - outer) / layer)))


def _header(*names: str) -> Iterator[str]:
    """The two lines that begin a table."""
    yield row(names)
    yield row(["---"] * len(names))


def _measured(shape: Shape, recipe: Recipe, device: torch.device, steps: int) -> Measured | Failed:
    def measure() -> Measured:
        with trial(shape, recipe, device) as made:
            return made.measure(steps)

    return attempt(measure, device)


def _speed(found: Measured | Failed) -> str:
    return found.text if isinstance(found, Failed) else f"{found.tokens_per_s:,.0f}"


def _speed_and_memory(found: Measured | Failed) -> list[str]:
    if isinstance(found, Failed):
        return [found.text, "", "", ""]
    mfu = f"{found.mfu:.1%}" if found.mfu else ""
    return [_speed(found), mfu, gigabytes(found.peak_bytes), gigabytes(found.reserved_bytes)]


def _against(found: Measured | Failed, plain: Sequence[Measured]) -> list[str]:
    """Speed with its ratio to the mean of ``plain``, and memory with that to the most of them, where there are any."""
    if isinstance(found, Failed):
        return [found.text, "", "", ""]
    speed = memory = ""
    if plain:
        speed = f"{found.tokens_per_s / fmean(one.tokens_per_s for one in plain):.3f}"
    if peak := max((one.peak_bytes for one in plain), default=0):
        memory = f"{found.peak_bytes / peak:.2f}"
    return [_speed(found), speed, gigabytes(found.peak_bytes), memory]


def _attentions(device: torch.device) -> Iterator[str]:
    from transformers.utils import is_flash_attn_2_available

    yield "sdpa"
    if device.type == "cuda" and is_flash_attn_2_available():
        yield "flash_attention_2"


def _trainer_rate(
    shape: Shape, length: int, rows: int, micro_rows: int, attention: str, steps: int, device: torch.device, *, compiled: bool
) -> float:
    """Tokens a second of transformers' Trainer, Liger's kernels on where they are installed."""
    import tempfile
    from importlib.util import find_spec

    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    release(device)
    warm_up = 3
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wait(device)
            times.append(time.perf_counter())

    with device:  # drawn there: a billion numbers take a CPU long
        model = AutoModelForCausalLM.from_config(shape.config(length), attn_implementation=attention, dtype=torch.float32)
    tokens = torch.randint(shape.vocabulary, (rows * (warm_up + steps), length), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=warm_up + steps,
            per_device_train_batch_size=micro_rows,
            gradient_accumulation_steps=rows // micro_rows,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            bf16=True,
            use_cpu=device.type == "cpu",
            torch_compile=compiled,
            use_liger_kernel=device.type == "cuda" and find_spec("liger_kernel") is not None,
            report_to="none",
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
        )
        Trainer(
            model=model,
            args=arguments,
            train_dataset=[{"input_ids": ids, "labels": ids} for ids in tokens],  # type: ignore[arg-type]
            data_collator=lambda items: {key: torch.stack([item[key] for item in items]) for key in ("input_ids", "labels")},
            callbacks=[Clock()],
        ).train()
    return steps * rows * length / (times[-1] - times[-1 - steps])


SECTIONS: Mapping[str, Callable[[torch.device, bool], Iterator[str]]] = {
    "pretraining": pretraining,
    "qlora": qlora,
    "trainer": trainer,
    "switches": switches,
    "syncs": syncs,
}
"""By the names that ``gpu.py`` has titles for."""
