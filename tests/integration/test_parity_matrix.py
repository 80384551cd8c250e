"""The whole matrix: every method with every engine, and what engines can be asked for, against the oracle over 20 steps.

What ``combinations`` refuses is refused by name; all else trains and agrees. ``make test-parity`` runs it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine_cases import TORCH_WARNS_ITSELF, Case, Outcome, born_engine, born_weights, on_ranks, train
from expected_losses import close, expected, on_one, tolerance_of
from safetensors.torch import save_file

from outgrow.errors import PlanError
from outgrow.recipes.combinations import ENGINES, METHODS, refusals

pytestmark = [pytest.mark.parity, pytest.mark.timeout(1800), pytest.mark.filterwarnings(*TORCH_WARNS_ITSELF)]

RANK = 4


def cell(method: str, engine: str) -> Case:
    """The case of one cell, in the widest precision that the engine and the method have; two ranks, or 2 x 2."""
    parallel, adapter = ENGINES[engine], METHODS[method]
    kind = parallel["kind"]
    narrow = kind == "zero" or adapter.get("base") == "nf4"
    return Case(
        engine="plain" if kind == "auto" else kind,
        replicate=2 if kind == "ddp" or "shard" in parallel else 1,
        shard=1 if kind in ("auto", "ddp") else 2,
        micro_rows=2,
        precision="fp32" if narrow else "fp64",
        adapter={} if adapter["kind"] == "none" else {**adapter, "rank": RANK},
        settings={"parallel": parallel},
    )


CELLS = {f"{method}, {engine}": cell(method, engine) for method in METHODS for engine in ENGINES}


def fsdp2(**settings: Any) -> dict[str, Any]:
    return {"parallel": {"kind": "fsdp2", **settings}}


SELECTIVE, FULL = ({"activation_checkpointing": {"kind": kind}} for kind in ("selective", "full"))
ZERO_3 = {"parallel": {"kind": "zero", "stage": 3}}
DDP = {"parallel": {"kind": "ddp"}}
QLORA = {"kind": "lora", "base": "nf4", "rank": RANK}
COMPILED = {"compile": "blocks"}
OPTIONS = {
    "fsdp2 on 4, reduced once a step": Case(
        engine="fsdp2", shard=4, micro_rows=1, settings=fsdp2(reduce_gradients="last_micro_batch")
    ),
    "hsdp 2x2, reduced once a step": Case(
        engine="fsdp2", replicate=2, shard=2, micro_rows=1, settings=fsdp2(reduce_gradients="last_micro_batch")
    ),
    "fsdp2 on 2, gathered parameters kept": Case(engine="fsdp2", shard=2, settings=fsdp2(reshard_after_forward=False)),
    "fsdp2 on 2, gathered when needed": Case(engine="fsdp2", shard=2, settings=fsdp2(prefetch_blocks=0)),
    "fsdp2 on 2, gathered far ahead": Case(engine="fsdp2", shard=2, settings=fsdp2(prefetch_blocks=8) | FULL),
    "fsdp2 on 2, selective checkpointing": Case(engine="fsdp2", shard=2, settings=SELECTIVE),
    "hsdp 2x2, offloaded": Case(engine="fsdp2", replicate=2, shard=2, micro_rows=1, settings=fsdp2(offload="cpu")),
    "ddp on 4, checkpointed": Case(engine="ddp", replicate=4, micro_rows=1, settings=DDP | FULL),
    "mixtral, fsdp2 on 4": Case(engine="fsdp2", shard=4, micro_rows=1, family="mixtral"),
    "mixtral, ddp on 4": Case(engine="ddp", replicate=4, micro_rows=1, family="mixtral", settings=DDP),
    "gemma2, hsdp 2x2": Case(engine="fsdp2", replicate=2, shard=2, family="gemma2"),
    "gemma2, ddp on 2": Case(engine="ddp", replicate=2, micro_rows=1, family="gemma2", settings=DDP),
    "gemma2, zero-3 on 2": Case(engine="zero", shard=2, micro_rows=2, precision="fp32", family="gemma2", settings=ZERO_3),
    "mixtral, zero-3 on 2": Case(engine="zero", shard=2, micro_rows=2, precision="fp32", family="mixtral", settings=ZERO_3),
    "fp32, hsdp 2x2": Case(engine="fsdp2", replicate=2, shard=2, precision="fp32"),
    "fp32, ddp on 2": Case(engine="ddp", replicate=2, precision="fp32", settings=DDP),
    "lora and whole modules, fsdp2 on 4": Case(
        engine="fsdp2",
        shard=4,
        micro_rows=1,
        adapter={"kind": "lora", "rank": RANK, "targets": ["*_proj"], "fully_trained": ["*norm", "embed_tokens"]},
    ),
    "lora of chosen layers, hsdp 2x2": Case(
        engine="fsdp2",
        replicate=2,
        shard=2,
        micro_rows=1,
        adapter={"kind": "lora", "rank": RANK, "targets": ["q_proj", "v_proj"]},
    ),
    "fp32, compiled, fsdp2 on 2": Case(engine="fsdp2", shard=2, precision="fp32", settings=COMPILED),
    "fp32, compiled, checkpointed, ddp on 2": Case(engine="ddp", replicate=2, precision="fp32", settings=DDP | COMPILED | FULL),
    "fp32, compiled, selective, fsdp2 on 2": Case(engine="fsdp2", shard=2, precision="fp32", settings=COMPILED | SELECTIVE),
    "fp32, compiled, lora, fsdp2 on 2": Case(
        engine="fsdp2", shard=2, precision="fp32", adapter={"kind": "lora", "rank": RANK}, settings=COMPILED
    ),
    "fp32, compiled, qlora": Case(engine="plain", precision="fp32", adapter=QLORA, settings=COMPILED),
    "fp32, compiled, checkpointed, qlora, fsdp2 on 2": Case(
        engine="fsdp2",
        shard=2,
        precision="fp32",
        adapter=QLORA,
        settings=COMPILED | FULL,
    ),
    "fp32, checkpointed, qlora, zero-3 on 2": Case(
        engine="zero", shard=2, precision="fp32", adapter=QLORA, settings=ZERO_3 | FULL
    ),
    "bf16, fsdp2 on 2": Case(engine="fsdp2", shard=2, precision="bf16"),
    "bf16, fsdp2 on 2, reduced once a step": Case(
        engine="fsdp2", shard=2, micro_rows=1, precision="bf16", settings=fsdp2(reduce_gradients="last_micro_batch")
    ),
    "bf16, fsdp2 on 2, offloaded": Case(engine="fsdp2", shard=2, precision="bf16", settings=fsdp2(offload="cpu")),
    "bf16, ddp on 2": Case(engine="ddp", replicate=2, micro_rows=1, precision="bf16", settings=DDP),
    "bf16, lora, fsdp2 on 2": Case(engine="fsdp2", shard=2, precision="bf16", adapter={"kind": "lora", "rank": RANK}),
    "bf16, zero-3 on 2": Case(engine="zero", shard=2, precision="bf16", settings=ZERO_3),
    "bf16, qlora, fsdp2 on 2": Case(engine="fsdp2", shard=2, precision="bf16", adapter=QLORA),
    "bf16, qlora, zero-3 on 2": Case(engine="zero", shard=2, precision="bf16", adapter=QLORA, settings=ZERO_3),
}
"""What engines can be asked for besides, by name."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``base``, the weights that all cases begin with, as a folder; and ``nvme``, to offload to."""
    folder = tmp_path_factory.mktemp("parity")
    for name in ("base", "nvme"):
        (folder / name).mkdir()
    save_file({name: values.contiguous() for name, values in born_weights(Case()).items()}, folder / "base/model.safetensors")
    return folder


def placed(case: Case, folder: Path) -> Case:
    """``case`` with the folders that it needs."""
    four_bits = case.adapter.get("base") == "nf4"
    return replace(case, base=str(folder / "base") if four_bits else "", nvme=str(folder / "nvme"))


def allowed(case: Case, folder: Path) -> bool:
    return not refusals(placed(case, folder).recipe(), "cpu")


@pytest.fixture(scope="module")
def outcomes(folder: Path, request: pytest.FixtureRequest) -> dict[str, Outcome]:
    """The outcomes of the chosen cases that are allowed: those of several ranks from one start of four processes."""
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    cases = {name: placed(case, folder) for name, case in (CELLS | OPTIONS).items() if name in asked and allowed(case, folder)}
    several = {name: case for name, case in cases.items() if case.world > 1}
    alone = {name: train(case) for name, case in cases.items() if case.world == 1}
    return alone | (on_ranks(several, folder) if several else {})


@pytest.mark.parametrize("name", CELLS)
def test_every_method_on_every_engine_agrees_or_is_refused(name: str, outcomes: dict[str, Outcome], folder: Path) -> None:
    case = placed(CELLS[name], folder)
    if found := refusals(case.recipe(), "cpu"):
        with pytest.raises(PlanError, match=re.escape(found[0].asked)):
            born_engine(case)
        return
    close(outcomes[name], *expected(case), tolerance_of(case))
    assert outcomes[name].validation == pytest.approx(on_one(case).validation, abs=tolerance_of(case))
    assert outcomes[name].born == on_one(case).born


@pytest.mark.parametrize("name", [name for name, case in OPTIONS.items() if case.precision != "bf16"])
def test_every_option_agrees(name: str, outcomes: dict[str, Outcome], folder: Path) -> None:
    case = placed(OPTIONS[name], folder)
    close(outcomes[name], *expected(case), tolerance_of(case))
    assert outcomes[name].validation == pytest.approx(on_one(case).validation, abs=tolerance_of(case))


@pytest.mark.parametrize("name", [name for name, case in OPTIONS.items() if case.precision == "bf16"])
def test_bf16_stays_near_plain(name: str, outcomes: dict[str, Outcome], folder: Path) -> None:
    alone = on_one(placed(OPTIONS[name], folder))
    # The worst of twenty steps, over four seeds: losses 1e-4 to 5e-4, norms 3e-4 to 1e-3 of themselves; those of adapters,
    # whose small matrices are multiplied in bfloat16, 5e-3 to 9e-3.
    norm = 0.01 if OPTIONS[name].adapter else 0.003
    assert outcomes[name].losses == pytest.approx(alone.losses, rel=0, abs=0.001)
    assert outcomes[name].norms == pytest.approx(alone.norms, rel=norm, abs=0)


@pytest.mark.parametrize("kind", ["full", "selective"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_activation_checkpointing_is_bit_equal(kind: str, family: str) -> None:
    case = Case(family=family, precision="bf16")
    assert train(replace(case, settings={"activation_checkpointing": {"kind": kind}})) == on_one(case)
