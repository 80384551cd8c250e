"""The forecast of memory against what was measured, against a tracker of real tensors, and against slow sums by hand."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import tiny_models  # noqa: F401  # before transformers
import torch
from packed import batch, corpus, global_weight
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig

from outgrow.cluster.presets_page import SHAPES, llama_facts
from outgrow.contracts import Forecast
from outgrow.recipes.layout import resolve
from outgrow.recipes.memory import count, forecast, state_bytes
from outgrow.recipes.memory.forecast import UPDATE_PIECE
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.optimizer import AdamW8bit
from outgrow.trainers.engines import make_engine, unmarked
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.initialise import SeededWeights
from outgrow.trainers.optimizers.adamw_8bit import NamedAdamW8bit

GB, GIB = 10**9, 2**30
LLAMA_2 = {"vocab_size": 32_000, "tie_word_embeddings": False}
SIZES: dict[str, dict[str, Any]] = {
    "7B": LLAMA_2
    | dict(hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32),
    "70B": LLAMA_2
    | dict(hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8),
    "8B of Llama 3": SHAPES["llama-3-8b"],
    "70B of Llama 3": SHAPES["llama-3-70b"],
    "small": dict(
        hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=1024, tie_word_embeddings=False,
    ),
    "large head": dict(
        hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=24_000, tie_word_embeddings=False,
    ),
}  # fmt: skip
QLORA = {"kind": "lora", "base": "nf4"}
FULL = {"kind": "full"}


def recipe(length: int = 2048, rows: int = 1, **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "schema": 1,
        "run": {"name": "case", "seed": 1},
        "model": {"kind": "folder", "path": "model"},
        "data": {
            "sequence_length": length,
            "tokenizer": {"kind": "folder", "path": "model"},
            "streams": [{"name": "a", "source": {"kind": "text", "path": "texts"}}],
            "loader_workers": 0,
        },
        "batch": {"rows": rows},
        "duration": {"steps": 10},
        "optimizer": {"kind": "adamw", "learning_rate": 1e-3},
        "precision": "bf16",
    }
    return Recipe.model_validate(data | changes)


def foreseen(size: str, asked: Recipe, world: int = 1, local_world: int | None = None, device: str = "cuda") -> Forecast:
    local = local_world or min(world, 8)
    found = forecast(asked, llama_facts(SIZES[size], asked), resolve(asked, world, local), local, device)
    assert found is not None
    return found


def tensors(found: Forecast) -> int:
    """Bytes on the device without what the allocator and CUDA have for themselves, which a tracker of tensors does not see."""
    return sum(value for name, value in found.device.items() if name not in ("allocator", "context"))


@pytest.mark.parametrize(
    ("size", "world", "measured"), [("7B", 8, 15.1 * GIB), ("70B", 64, 25.8 * GIB), ("70B", 8, 137.4 * GIB)]
)
def test_fsdp2_within_a_tenth_of_what_was_tracked(size: str, world: int, measured: float) -> None:
    """By PyTorch's FSDPMemTracker: float32 shards, bfloat16 compute, AdamW, 1 x 2048 tokens a rank, full checkpointing."""
    asked = recipe(rows=world, activation_checkpointing=FULL)
    assert tensors(foreseen(size, asked, world)) == pytest.approx(measured, rel=0.1)


def test_qlora_of_a_70b_within_a_tenth_of_the_sum_by_hand() -> None:
    for loss in ("whole", "chunked"):
        asked = recipe(adapter=QLORA, activation_checkpointing=FULL, cross_entropy={"kind": loss})
        assert tensors(foreseen("70B of Llama 3", asked)) == pytest.approx(45.5 * GB, rel=0.1)
    assert foreseen("70B of Llama 3", asked).disk["4-bit weights"] == pytest.approx(35.3 * GB, rel=0.01)


@pytest.mark.filterwarnings("ignore:Expected a tensor or a traceable wrapper-subclass")
@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32"},
        {"precision": "fp32", "activation_checkpointing": FULL, "cross_entropy": {"kind": "chunked", "tokens": 32}},
        {"precision": "bf16"},
    ],
    ids=["fp32", "recomputed and chunked", "bf16"],
)
def test_one_step_of_a_small_model_is_near_what_is_tracked(changes: dict[str, Any]) -> None:
    asked = recipe(96, 2, **changes)
    assert tensors(foreseen("small", asked, device="cpu")) == pytest.approx(tracked(asked), rel=0.15)


@pytest.mark.filterwarnings("ignore:Expected a tensor or a traceable wrapper-subclass")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_heads_gradient_is_there_beneath_the_activations(precision: str) -> None:
    asked = recipe(96, 16, precision=precision, cross_entropy={"kind": "chunked", "tokens": 32})
    there = tracked(asked, "large head")
    assert 0.97 * there <= tensors(foreseen("large head", asked, device="cpu")) <= 1.15 * there


def test_an_update_in_8_bits_unpacks_a_piece_at_a_time() -> None:
    from outgrow.trainers.optimizers.eight_bit import _PIECE

    assert UPDATE_PIECE == _PIECE
    weight = torch.nn.Parameter(torch.zeros(3 * 2048, 2048))
    weight.grad = torch.ones_like(weight)
    optimizer = NamedAdamW8bit({"weight": weight}, AdamW8bit(kind="adamw_8bit", learning_rate=1e-3))
    tracker = MemTracker()
    tracker.track_external(weight, weight.grad, *optimizer.tensors().values())
    before = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
    with tracker:
        optimizer.step(1e-3, torch.ones(()))
    beside = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] - before
    # The index of a look-up in the codebook is turned to 8 bytes where no tracker sees it.
    assert beside + 8 * UPDATE_PIECE == pytest.approx(7 * 4 * UPDATE_PIECE, rel=0.05)


def tracked(asked: Recipe, size: str = "small") -> int:
    """The most bytes that tensors had at once in a real step of the plain engine."""
    vocab = SIZES[size]["vocab_size"]
    config = LlamaConfig(**SIZES[size], max_position_embeddings=96, use_cache=False, pad_token_id=None)
    engine = make_engine(resolve(asked, 1, 1), asked, meta_model(config, asked.precision), torch.device("cpu"))
    engine.load_model(SeededWeights(config, 1))
    rows = corpus(1, steps=1, rows=asked.batch.rows, length=96, vocab=vocab)[0]
    tracker = MemTracker()
    tracker.track_external(engine._model, *engine.tensors().values())
    with tracker:
        engine.accumulate(batch(rows, 96), global_weight(rows), unmarked)
        engine.finish()
        engine.apply(1e-3)
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


def test_counts_are_those_of_a_slow_sum() -> None:
    asked = recipe(adapter={"kind": "lora", "rank": 8, "targets": ["q_proj", "mlp.*"], "dora": True, "base": "nf4"})
    facts = llama_facts(SIZES["small"], asked)
    trained = packed = frozen = 0
    for name, shape in facts.shapes.items():
        linear = name.endswith("_proj.weight")
        if "q_proj" in name or ".mlp." in name:
            trained += 8 * shape[0] + 8 * shape[1] + shape[0]
        if linear:
            packed += prod(shape)
        else:
            frozen += prod(shape)
    counted = count(asked, facts)
    assert (counted.whole.trained, counted.whole.packed, counted.whole.frozen) == (trained, packed, frozen)
    assert counted.root.frozen == 2 * 1024 * 128 + 128
    assert 4 * counted.block.packed == packed


def test_states_by_optimizer() -> None:
    facts = llama_facts(SIZES["small"], recipe())
    total, blocks = facts.parameters, facts.parameters - 2 * 1024 * 128 - 9 * 128
    settings = {"learning_rate": 1e-3}
    assert state_bytes(recipe(), facts) == 12 * total
    assert state_bytes(recipe(precision="fp64"), facts) == 24 * total
    assert state_bytes(recipe(optimizer={"kind": "muon"} | settings), facts) == 12 * total - 4 * blocks
    assert state_bytes(recipe(optimizer={"kind": "adamw_8bit"} | settings), facts) == pytest.approx(6.03 * total, rel=0.001)


def zero(stage: int, **offload: str) -> dict[str, Any]:
    return {"kind": "zero", "stage": stage} | offload


def test_each_thing_that_saves_memory_saves_it() -> None:
    """From left to right less on the device; what goes to memory or disk is there."""
    size, world = "8B of Llama 3", 8
    saving = {"activation_checkpointing": FULL, "cross_entropy": {"kind": "chunked"}}
    orders: list[list[dict[str, Any]]] = [
        [{}, {"activation_checkpointing": {"kind": "selective"}}, {"activation_checkpointing": FULL}],
        [{"batch": {"rows": 64, "micro_rows": 8}} | changes for changes in ({"activation_checkpointing": FULL}, saving)],
        [{"batch": {"rows": 64, "micro_rows": rows}} for rows in (8, 4, 1)],
        [saving | {"batch": {"rows": 128, "micro_rows": 16}, "activation_offload": offload} for offload in (False, True)],
        [saving | {"parallel": parallel} for parallel in ({"kind": "ddp"}, zero(1), zero(2), zero(3))],
        [saving | {"parallel": parallel} for parallel in (zero(3), zero(3, offload_optimizer="cpu"))],
        [saving | {"parallel": {"kind": "fsdp2", "shard": shard}} for shard in (1, 2, 8)],
        [saving | {"parallel": {"kind": "fsdp2", "offload": offload}} for offload in ("none", "cpu")],
        [saving | {"adapter": adapter} for adapter in ({"kind": "none"}, {"kind": "lora"}, QLORA)],
    ]
    for order in orders:
        sums = [tensors(foreseen(size, recipe(rows=8, **changes), world)) for changes in order]
        assert sums == sorted(sums, reverse=True) and len(set(sums)) == len(sums), (order, sums)


def test_offload_says_where_states_go_and_what_a_step_moves() -> None:
    parameters = llama_facts(SHAPES["llama-3-8b"], recipe()).parameters
    saving = {"activation_checkpointing": FULL, "batch": {"rows": 32, "micro_rows": 1}}
    in_memory = foreseen("8B of Llama 3", recipe(**saving, parallel=zero(3, offload_optimizer="cpu")), 8)
    assert in_memory.host["optimizer"] == pytest.approx(12 * parameters)
    assert "optimizer" not in in_memory.device
    assert not in_memory.disk and not in_memory.step_read_bytes

    on_disk = zero(3, offload_optimizer="nvme", offload_parameters="nvme")
    for world, nodes in ((8, 1), (16, 2)):
        moved = foreseen("8B of Llama 3", recipe(**saving, parallel=on_disk), world)
        assert moved.disk["offload"] == pytest.approx((12 + 4 + 2) * parameters / nodes)
        accumulation = 32 // world
        assert moved.step_read_bytes == pytest.approx((12 + 4 + 2 * 2 * accumulation) * parameters / nodes)
        assert moved.step_written_bytes == pytest.approx((12 + 4 + 2) * parameters / nodes)
        assert moved.host["checkpoint"] == pytest.approx(12 * parameters / nodes)


@pytest.mark.parametrize(("size", "world", "more"), [("8B of Llama 3", 3, 0.65), ("70B of Llama 3", 8, 0.11)])
def test_each_shard_that_fsdp2_offloads_from_a_gpu_takes_a_power_of_two(size: str, world: int, more: float) -> None:
    asked = recipe(rows=world, parallel={"kind": "fsdp2", "offload": "cpu"})
    on_gpu, on_cpu = (foreseen(size, asked, world, device=device).host for device in ("cuda", "cpu"))
    slow = 0
    for shape in llama_facts(SIZES[size], asked).shapes.values():
        block = 1
        while block < 4 * prod(shape) / world:
            block *= 2
        slow += world * block
    assert on_gpu["weights"] == on_gpu["gradients"] == slow
    assert slow / on_cpu["weights"] - 1 == pytest.approx(more, abs=0.01)
    assert on_gpu["optimizer"] == on_cpu["optimizer"], "which is not pinned"


def test_what_deepspeed_pins_is_in_powers_of_two_a_block() -> None:
    saving = {"activation_checkpointing": FULL, "batch": {"rows": 8, "micro_rows": 1}}
    facts = llama_facts(SHAPES["llama-3-8b"], recipe())
    vectors = sum(prod(shape) for shape in facts.shapes.values() if len(shape) == 1)

    def host(parallel: dict[str, Any], device: str = "cuda") -> dict[str, int]:
        return foreseen("8B of Llama 3", recipe(**saving, parallel=parallel), 8, device=device).host

    both = zero(3, offload_optimizer="cpu", offload_parameters="cpu")
    # A thousand million numbers of 4 bytes, and the vectors, beside the sums.
    assert host(both)["gradients"] == 8 * (2**32 + 2**32 + 2 ** (4 * vectors // 8 - 1).bit_length())
    assert host(both)["weights"] > 2**31 * 8 + host(both, "cpu")["weights"]
    not_pinned = {"zero_optimization": {"offload_optimizer": {"pin_memory": False}, "offload_param": {"pin_memory": False}}}
    assert host(both | {"deepspeed": not_pinned}) == host(both, "cpu") | {"processes": host(both)["processes"]}
    assert host(zero(2, offload_optimizer="cpu"))["weights"] >= 2 * facts.parameters, "copies that compute"


def test_buffers_of_offload_to_disk_are_as_deepspeeds_own_block_says() -> None:
    def host(offload: dict[str, Any] | None = None, **keys: Any) -> dict[str, int]:
        block = {"zero_optimization": {**keys, **(offload or {})}}
        parallel = zero(3, offload_optimizer="nvme", offload_parameters="nvme") | {"deepspeed": block}
        return foreseen("8B of Llama 3", recipe(parallel=parallel), 1).host

    def sub_group(most: int) -> int:
        largest = gathered = 0
        for shape in llama_facts(SHAPES["llama-3-8b"], recipe()).shapes.values():
            gathered += prod(shape) if len(shape) > 1 else 0
            largest, gathered = max(largest, gathered), 0 if gathered >= most else gathered
        return largest

    parameters, count = 2 * 8 * 128_256 * 4096, 4
    assert host()["buffers"] == parameters + 4 * count * sub_group(100_000_000)
    assert host(sub_group_size=7)["buffers"] == parameters + 4 * count * 128_256 * 4096
    assert host(sub_group_size=10**9)["buffers"] == parameters + 4 * count * sub_group(10**9)
    assert host({"offload_optimizer": {"buffer_count": 6}})["buffers"] == host()["buffers"] + 2 * 4 * sub_group(100_000_000)
    few = {"offload_param": {"buffer_count": 5, "buffer_size": 1_000_000}}
    assert host(few)["buffers"] == 4 * count * sub_group(100_000_000) + 2 * 5 * 1_000_000
    assert "weights" not in host()
    assert host({"offload_param": {"max_in_cpu": 10**9}})["weights"] == 2**31


def test_with_offload_of_fsdp2_4_bit_weights_lie_in_memory_too() -> None:
    asked = recipe(adapter=QLORA, parallel={"kind": "fsdp2", "offload": "cpu"})
    found, packed = foreseen("8B of Llama 3", asked), count(asked, llama_facts(SHAPES["llama-3-8b"], asked)).whole.packed
    assert found.device["weights"] < 0.05 * packed, "their scales alone"
    assert found.host["weights"] > packed / 2


def test_stage_3_shares_4_bit_weights_among_ranks_and_puts_them_where_parameters_go() -> None:
    def held(stage: int, **offload: str) -> Forecast:
        return foreseen("8B of Llama 3", recipe(rows=8, adapter=QLORA, parallel=zero(stage, **offload)), 8)

    asked = recipe(adapter=QLORA)
    counts = count(asked, llama_facts(SHAPES["llama-3-8b"], asked)).whole
    kept = held(2).device["weights"] - held(3).device["weights"]
    assert kept == pytest.approx((counts.packed / 2 + 2 * (counts.frozen + counts.trained)) * 7 / 8)
    in_memory = held(3, offload_parameters="cpu", offload_optimizer="cpu")
    assert in_memory.device["weights"] < 0.05 * counts.packed, "their scales alone"
    assert counts.packed / 2 < in_memory.host["weights"] < counts.packed + 8 * counts.frozen, "pinned, so up to twice"
    on_disk = held(3, offload_parameters="nvme", offload_optimizer="nvme")
    assert on_disk.disk["offload"] > counts.packed / 2
    assert on_disk.step_read_bytes > counts.packed


def test_fsdp2_that_keeps_what_it_gathers_holds_all_but_the_head_as_blocks_go_back() -> None:
    facts = llama_facts(SHAPES["llama-3-8b"], recipe())
    head = facts.shapes["lm_head.weight"]
    asked = recipe(rows=8, activation_checkpointing=FULL, parallel={"kind": "fsdp2", "reshard_after_forward": False})
    beside = prod(head) + facts.hidden_size  # the last norm is the root's
    assert foreseen("8B of Llama 3", asked, 8).device["gathered"] == 2 * (facts.parameters - beside)


@pytest.mark.parametrize("trained", ["lm_head", "model.embed_tokens"])
@pytest.mark.parametrize("adapted", [(), ("lm_head.weight",)], ids=["", "adapter on the head"])
def test_the_gradient_of_a_head_or_embedding_that_an_adapters_run_trains_is_counted(
    trained: str, adapted: tuple[str, ...]
) -> None:
    asked = recipe(adapter={"kind": "lora", "rank": 4})
    facts = replace(llama_facts(SIZES["small"], asked), whole=(f"{trained}.weight",), adapted=adapted)
    assert count(asked, facts).outside.trained == 1024 * 128


def test_masks_are_counted_where_a_kernel_needs_them() -> None:
    def kept(attention: str, device: str) -> int:
        return tensors(foreseen("8B of Llama 3", recipe(8192, attention=attention), device=device))

    assert kept("auto", "cuda") < kept("sdpa", "cuda") < kept("eager", "cuda")
    assert kept("auto", "cpu") == kept("sdpa", "cpu")


def test_a_model_of_unknown_shapes_has_no_forecast() -> None:
    asked = recipe()
    facts = replace(llama_facts(SIZES["small"], asked), shapes={})
    assert forecast(asked, facts, resolve(asked, 1, 1), 1, "cpu") is None
    assert state_bytes(asked, facts) == 12 * facts.parameters
