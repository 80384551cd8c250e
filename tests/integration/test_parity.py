"""Every engine and layout computes what the oracle computes: losses and gradient norms over 20 steps.

In float64 within 1e-9, which tells bugs from rounding; in float32 within 1e-5; in bfloat16 within what was measured. Here is
the part that every change must pass; test_parity_matrix.py has all of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import engine_cases
import pytest
import torch
from engine_cases import Case, Outcome, born_engine, born_weights, on_ranks, rows_of_steps, train, trained_steps
from expected_losses import TOLERANCE, close, expected, on_one, tolerance_of
from packed import Row, batch, unweighted

FAMILIES = ("llama", "gemma2", "mixtral")
LORA = {"kind": "lora", "rank": 4}
RANKS = {
    "fsdp2 on 1": Case(engine="fsdp2"),
    "fsdp2 on 2, 1 row at a time": Case(engine="fsdp2", shard=2, micro_rows=1),
    "fsdp2 on 4": Case(engine="fsdp2", shard=4),
    "hsdp 2x2, 1 row at a time": Case(engine="fsdp2", replicate=2, shard=2, micro_rows=1),
    "ddp on 2, 1 row at a time": Case(engine="ddp", replicate=2, micro_rows=1, settings={"parallel": {"kind": "ddp"}}),
    "fsdp2 on 2, offloaded, reduced once a step": Case(
        engine="fsdp2",
        shard=2,
        micro_rows=2,
        settings={"parallel": {"kind": "fsdp2", "offload": "cpu", "reduce_gradients": "last_micro_batch"}},
    ),
    "lora, fsdp2 on 2": Case(engine="fsdp2", shard=2, adapter=LORA),
    "mixtral, fsdp2 on 4": Case(engine="fsdp2", shard=4, micro_rows=1, family="mixtral"),
    "fp32, fsdp2 on 2": Case(engine="fsdp2", shard=2, precision="fp32"),
    "fp32, fsdp2 on 2, again": Case(engine="fsdp2", shard=2, precision="fp32"),
    "fp32, zero-3 on 2": Case(
        engine="zero", shard=2, micro_rows=2, precision="fp32", settings={"parallel": {"kind": "zero", "stage": 3}}
    ),
    "bf16, fsdp2 on 1": Case(engine="fsdp2", precision="bf16", micro_rows=3),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The outcomes of ``RANKS``, all from one start of four processes."""
    return on_ranks(RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("family", "precision"), [(family, "fp64") for family in FAMILIES] + [("llama", "fp32")])
def test_plain_equals_the_oracle(family: str, precision: str) -> None:
    case = Case(family=family, precision=precision)
    close(on_one(case), *expected(case), tolerance_of(case))


def test_the_oracle_learns_and_is_clipped() -> None:
    """Or the comparison would be one of noise."""
    losses, norms = expected(Case())
    assert losses[-1] < losses[0] - 0.4
    assert max(norms) > Case().recipe().optimizer.clip_norm


@pytest.mark.parametrize(("precision", "micro_rows"), [("fp64", 1), ("fp32", 3), ("bf16", 3)])
def test_accumulation_changes_rounding_alone(precision: str, micro_rows: int) -> None:
    whole, parts = on_one(Case(precision=precision)), train(Case(precision=precision, micro_rows=micro_rows))
    close(parts, whole.losses, whole.norms, TOLERANCE[precision])


@pytest.mark.parametrize("name", [name for name, case in RANKS.items() if case.precision != "bf16"])
def test_ranks_equal_the_oracle(name: str, ranks: dict[str, Outcome]) -> None:
    case = RANKS[name]
    close(ranks[name], *expected(case), tolerance_of(case))
    assert ranks[name].validation == pytest.approx(on_one(case).validation, abs=tolerance_of(case))


def test_mixed_precision_of_plain_is_that_of_fsdp2(ranks: dict[str, Outcome]) -> None:
    assert ranks["bf16, fsdp2 on 1"] == train(Case(precision="bf16", micro_rows=3))


def test_fsdp2_on_one_rank_is_bit_equal_to_plain(ranks: dict[str, Outcome]) -> None:
    assert ranks["fsdp2 on 1"] == on_one(Case())


def test_the_same_model_is_born_everywhere(ranks: dict[str, Outcome]) -> None:
    for name, case in RANKS.items():
        assert ranks[name].born == on_one(case).born, name


def test_what_replicas_share_is_read_once(ranks: dict[str, Outcome]) -> None:
    assert ranks["ddp on 2, 1 row at a time"].readers == [0]
    assert ranks["hsdp 2x2, 1 row at a time"].readers == [0, 1]
    assert ranks["fsdp2 on 4"].readers == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning", "ignore:The .grad attribute:UserWarning")
def test_compiled_blocks_compute_the_same() -> None:
    """Few steps, all of one shape, as compiling takes its time; test_parity_matrix.py goes on to short steps."""
    torch.compiler.reset()
    eager, compiled = Case(precision="fp32"), Case(precision="fp32", settings={"compile": "blocks"})
    rows = rows_of_steps()[:3]
    expected_pairs = list(trained_steps(born_engine(eager), eager, 0, rows))
    assert list(trained_steps(born_engine(compiled), compiled, 0, rows)) == [
        pytest.approx(pair, rel=0, abs=TOLERANCE["fp32"]) for pair in expected_pairs
    ]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one graph serves both blocks, and it was used"


def test_the_same_layout_twice_is_bit_equal(ranks: dict[str, Outcome]) -> None:
    assert ranks["fp32, fsdp2 on 2"] == ranks["fp32, fsdp2 on 2, again"]
    assert train(Case(precision="fp32")) == on_one(Case(precision="fp32"))


def test_the_trainer_of_transformers_agrees(tmp_path: Path) -> None:
    """The same rows through transformers' own loop, loss, optimizer and clipping."""
    settings = {"schedule": {"kind": "constant"}}
    rows_of = [unweighted((rows * 2)[: engine_cases.ROWS]) for rows in rows_of_steps()]
    case = Case(precision="fp32", settings=settings)
    pairs = list(trained_steps(born_engine(case), case, 0, rows_of))
    losses, norms = _hf_trainer(case, rows_of, tmp_path)
    assert [loss for loss, _ in pairs] == pytest.approx(losses, rel=0, abs=TOLERANCE["fp32"])
    assert [norm for _, norm in pairs] == pytest.approx(norms, rel=0, abs=TOLERANCE["fp32"])


def _hf_trainer(case: Case, rows_of: Sequence[Sequence[Row]], folder: Path) -> tuple[list[float], list[float]]:
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    from outgrow.trainers.models.masks import attention_inputs

    optimizer = case.recipe().optimizer
    model = AutoModelForCausalLM.from_config(case.config())
    model.load_state_dict(born_weights(case))

    def collate(rows: list[Row]) -> dict[str, Any]:
        packed = batch(rows, engine_cases.LENGTH)
        inputs = attention_inputs(model.config, packed.segments, packed.positions)
        return {"input_ids": packed.token_ids, "labels": packed.targets, "shift_labels": packed.targets, **inputs}

    class Recording(Trainer):
        losses: list[float] = []

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = super().training_step(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

    trainer = Recording(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=engine_cases.ROWS,
            max_steps=len(rows_of),
            learning_rate=optimizer.learning_rate,
            lr_scheduler_type="constant",
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_epsilon=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.clip_norm,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=[documents for rows in rows_of for documents in rows],
        data_collator=collate,
    )
    trainer.train()
    return Recording.losses, [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
