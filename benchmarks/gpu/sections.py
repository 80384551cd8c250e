"""The sections of ``gpu.py``: each takes a device and whether it is a dry run, and gives Markdown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from training import Measured, Shape, Trial, device_name, gigabytes, recipe_of, release, row, trial, wait

from outgrow.errors import OutgrowError

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


def pretraining(device: torch.device, dry: bool) -> str:
    """Continued pretraining of all of an 8B, by micro-batch and what is recomputed."""
    shape = TOY if dry else _fitting(LLAMA_8B, device)
    length, rows = (TOY_LENGTH, 4) if dry else (4096, 16)
    tried: list[tuple[int, dict[str, Any]]] = [
        (2, {"kind": "full"}),
        (2, {"kind": "selective"}),
        (4, {"kind": "full"}),
        (1, {"kind": "none"}),
    ]
    lines = [
        f"{shape.name} shape, {shape.layers} layers, {length} tokens a row, {rows} rows a step, bf16 with float32 masters, "
        "AdamW with moments in 8 bits: with moments in float32 the states of 8B alone take 144 GB.",
        "",
        row(["rows a micro-batch", "recomputed", "tokens/s", "MFU", "peak memory, GB", "reserved, GB"]),
        row(["---"] * 6),
    ]
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
        lines.append(row([micro_rows, checkpointing["kind"], *_speed_and_memory(shape, recipe, device, dry)]))
    return "\n".join(lines)


def qlora(device: torch.device, dry: bool) -> str:
    """QLoRA of a 70B of random weights, plain and on as little memory as can be."""
    shape, length = (TOY, TOY_LENGTH) if dry else (LLAMA_70B, 2048)
    lean: dict[str, Any] = {"optimizer": EIGHT_BIT, "activation_offload": device.type == "cuda"}
    lines = [
        f"{shape.name} shape, 1 row of {length} tokens, NF4 with double quantisation made on the device layer by layer, rank "
        "16 on all linear layers of the blocks, blocks recomputed, bf16.",
        "",
        row(["", "tokens/s", "peak memory, GB", "reserved, GB", "goal, GB", "made in, s", "peak meanwhile, GB"]),
        row(["---"] * 7),
    ]
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
        try:
            with trial(shape, recipe, device) as made:
                found = made.measure(1 if dry else 5)
                making = [f"{made.seconds:.0f}", gigabytes(made.peak_bytes)]
            memory = [gigabytes(found.peak_bytes), gigabytes(found.reserved_bytes)]
            lines.append(row([name, f"{found.tokens_per_s:,.0f}", *memory, goal, *making]))
        except torch.cuda.OutOfMemoryError:
            release(device)
            lines.append(row([name, "out of memory", "", "", goal, "", ""]))
    return "\n".join(lines)


def trainer(device: torch.device, dry: bool) -> str:
    """A 1B beside transformers' Trainer, which is compiled and has its best attention; outgrow before it and after it."""
    shape, length, rows = (replace(TOY, tied=True), TOY_LENGTH, 4) if dry else (LLAMA_1B, 2048, 32)
    steps = 2 if dry else 8
    ours: dict[str, float] = {}
    theirs: dict[str, float] = {}

    def measure_ours(micro_rows: int) -> float:
        recipe = recipe_of(length, rows, micro_rows, cross_entropy=CHUNKED, compile="none" if dry else "blocks")
        with trial(shape, recipe, device) as made:
            return made.measure(steps).tokens_per_s

    sizes = (2,) if dry else (4, 8, 16)
    for micro_rows in sizes:
        ours |= _found(f"{micro_rows}", lambda size=micro_rows: measure_ours(size), device)
        for attention in _attentions(device):
            label = f"{micro_rows} {attention}"
            theirs |= _found(
                label,
                lambda size=micro_rows, kernel=attention: _trainer_rate(
                    shape, length, rows, size, kernel, steps, device, compiled=not dry
                ),
                device,
            )
    if not ours or not theirs:
        return "out of memory in every size"
    best, other = max(ours, key=ours.__getitem__), max(theirs, key=theirs.__getitem__)
    again = measure_ours(int(best))
    rate = (ours[best] + again) / 2
    lines = [
        f"{shape.name} shape, {length} tokens a row, {rows} rows a step, float32 masters and bf16 arithmetic, fused AdamW.",
        "",
        row(["", "rows a micro-batch", "tokens/s"]),
        row(["---"] * 3),
        *(row(["outgrow", label, f"{found:,.0f}"]) for label, found in ours.items()),
        *(row(["transformers' Trainer, attention", label, f"{found:,.0f}"]) for label, found in theirs.items()),
        row(["outgrow again", best, f"{again:,.0f}"]),
        "",
        f"outgrow / Trainer, each at its best: {rate / theirs[other]:.3f} (goal: 1.1)",
    ]
    return "\n".join(lines)


def switches(device: torch.device, dry: bool) -> str:
    """Speed and memory of each switch of a recipe against none of them, which is measured before and after each."""
    shape, length = (TOY, TOY_LENGTH) if dry else (LLAMA_1B, 4096)
    names = ["loss in parts"] if dry else list(SWITCHES)

    def measured(sections: dict[str, Any]) -> Measured:
        with trial(shape, recipe_of(length, 4, 4, **sections), device) as made:
            return made.measure(1 if dry else 6)

    lines = [
        f"{shape.name} shape, 4 rows of {length} tokens a step, bf16. Ratios are to a recipe without any switch, the mean of "
        "one run before and one after.",
        "",
        row(["switch", "tokens/s", "speed, ratio", "peak memory, GB", "memory, ratio"]),
        row(["---"] * 5),
    ]
    before = measured({})
    lines.append(row(["none", f"{before.tokens_per_s:,.0f}", "", gigabytes(before.peak_bytes), ""]))
    for name in names:
        try:
            found = measured(SWITCHES[name])
        except (torch.cuda.OutOfMemoryError, OutgrowError) as error:
            release(device)
            lines.append(row([name, str(error).partition("\n")[0], "", "", ""]))
            continue
        after = measured({})
        speed = 2 * found.tokens_per_s / (before.tokens_per_s + after.tokens_per_s)
        memory = f"{found.peak_bytes / after.peak_bytes:.2f}" if after.peak_bytes else ""
        lines.append(row([name, f"{found.tokens_per_s:,.0f}", f"{speed:.3f}", gigabytes(found.peak_bytes), memory]))
        before = after
    return "\n".join(lines)


def syncs(device: torch.device, dry: bool) -> str:
    """Whether a step that is not logged waits for the device: CUDA calls that would are errors meanwhile."""
    shape, length = (TOY, TOY_LENGTH) if dry else (replace(LLAMA_1B, layers=4), 2048)
    cases: dict[str, dict[str, Any]] = {
        "full": {},
        "chunked loss, AdamW in 8 bits": {"cross_entropy": CHUNKED, "optimizer": EIGHT_BIT},
        "LoRA": {"adapter": {"kind": "lora"}},
        "QLoRA": {"adapter": {"kind": "lora", "base": "nf4"}},
        "FSDP2 on one rank": {"parallel": {"kind": "fsdp2"}},
    }
    lines = [row(["", "waits for the device"]), row(["---"] * 2)]
    for name, sections in cases.items():
        with trial(shape, recipe_of(length, 4, 2, **sections), device) as made:
            lines.append(row([name, _waits(made)]))
    return "\n".join(lines)


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
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"


def _fitting(shape: Shape, device: torch.device) -> Shape:
    """``shape`` with as many layers as fit, with an eighth of the memory left for activations."""
    room = 0.875 * torch.cuda.get_device_properties(device).total_memory
    outer = 2 * shape.vocabulary * shape.hidden
    layer = shape.hidden * (2 * shape.hidden + 2 * shape.hidden * shape.groups // shape.heads + 3 * shape.inner)
    return replace(shape, layers=min(shape.layers, int((room / BYTES_A_PARAMETER - outer) / layer)))


def _speed_and_memory(shape: Shape, recipe: Any, device: torch.device, dry: bool) -> list[str]:
    try:
        with trial(shape, recipe, device) as made:
            found: Measured = made.measure(1 if dry else 4)
    except torch.cuda.OutOfMemoryError:
        release(device)
        return ["out of memory", "", "", ""]
    mfu = f"{found.mfu:.1%}" if found.mfu else ""
    return [f"{found.tokens_per_s:,.0f}", mfu, gigabytes(found.peak_bytes), gigabytes(found.reserved_bytes)]


def _found(label: str, measure: Callable[[], float], device: torch.device) -> dict[str, float]:
    """``label`` and what was measured; nothing where memory was short."""
    try:
        return {label: measure()}
    except torch.cuda.OutOfMemoryError:
        release(device)
        return {}


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

    warm_up = 3
    times: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            wait(device)
            times.append(time.perf_counter())

    model = AutoModelForCausalLM.from_config(shape.config(length), attn_implementation=attention, dtype=torch.float32)
    tokens = torch.randint(shape.vocabulary, (rows * 4, length), generator=torch.Generator().manual_seed(1))
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
    del model
    release(device)
    return steps * rows * length / (times[-1] - times[-1 - steps])


SECTIONS: Mapping[str, tuple[str, Callable[[torch.device, bool], str]]] = {
    "pretraining": ("Continued pretraining of an 8B (goal: 50% MFU on an H200)", pretraining),
    "qlora": ("QLoRA of a 70B", qlora),
    "trainer": ("A 1B beside transformers' Trainer", trainer),
    "switches": ("Each switch by itself", switches),
    "syncs": ("Steps that wait for the device", syncs),
}

__all__ = ["SECTIONS", "device_name"]
