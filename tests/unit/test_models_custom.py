"""A model of the user's own: what of it is read, what it is refused for, and that it learns as by a loop by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import custom_gpt
import pytest
import torch
from engine_cases import LENGTH, SEED, STEPS, VOCAB, Case, rows_of_steps, trained_steps
from packed import global_weight
from torch import nn
from torch.nn import functional as F

from outgrow.errors import ModelError
from outgrow.recipes.combinations import refusals
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.trainers.ceilings import arithmetic_of
from outgrow.trainers.engines import Engine, make_engine
from outgrow.trainers.models.build import blocks, config_for, facts, meta_model
from outgrow.trainers.models.custom_probe import check_custom
from outgrow.trainers.models.initialise import SeededWeights
from outgrow.trainers.models.weights import tied_names
from outgrow.trainers.regions import Region
from outgrow.trainers.schedule import learning_rate


def case(factory: str = "custom_gpt:gpt", sequence_length: int = LENGTH, precision: str = "fp64", **options: Any) -> Case:
    data = {
        "sequence_length": sequence_length,
        "tokenizer": {"kind": "train", "vocab_size": 300},
        "streams": [{"name": "none", "source": {"kind": "text", "path": "none"}}],
    }
    return Case(
        precision=precision,
        settings={"model": {"kind": "custom", "factory": factory, "options": options}, "data": data},
    )


def recipe(*args: Any, **options: Any) -> Recipe:
    return case(*args, **options).recipe()


class Card:
    vocab_size, eos_token_id = VOCAB, 0


def born(chosen: Recipe) -> Engine:
    config = config_for(chosen, Site(), Card())
    engine = make_engine(Case().layout(), chosen, meta_model(config, chosen.precision), torch.device("cpu"))
    engine.load_model(SeededWeights(config, SEED))
    return engine


def weights_of(chosen: Recipe) -> dict[str, torch.Tensor]:
    source = SeededWeights(config_for(chosen, Site(), Card()), SEED)
    return {name: source.read(name, Region.whole(source.shape(name))) for name in source.names()}


def by_hand(chosen: Recipe, steps: list[Any]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step: the module that the factory makes, document by document, PyTorch's AdamW."""
    torch.set_default_dtype(torch.float64)
    model = custom_gpt.gpt(vocab_size=VOCAB, **chosen.model.options)
    torch.set_default_dtype(torch.float32)
    missing, extra = model.load_state_dict(
        {name.removeprefix("module."): value for name, value in weights_of(chosen).items()}, strict=False
    )
    assert (missing, extra) == (["head.weight"], [])
    settings = chosen.optimizer
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)
    found = []
    for number, rows in enumerate(steps):
        loss = torch.zeros((), dtype=torch.float64)
        for tokens, targets, weights in (document for documents in rows for document in documents):
            segments = torch.zeros_like(tokens)
            scores = model(tokens[None], segments[None], torch.arange(len(tokens))[None])[0]
            loss = loss + (F.cross_entropy(scores, targets, reduction="none") * weights).sum() / global_weight(rows)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(chosen, number, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        found.append((loss.item(), norm.item()))
    return found


def test_it_learns_what_a_loop_by_hand_would_teach_it() -> None:
    chosen, rows = case().recipe(), rows_of_steps()
    found = list(trained_steps(born(chosen), case(), 0, rows))
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found, by_hand(chosen, rows), strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-9)
        assert norm == pytest.approx(wanted_norm, rel=1e-9)


def test_what_planning_knows_of_it() -> None:
    found = facts(recipe(), Site(), Card())
    module = custom_gpt.gpt(vocab_size=VOCAB)
    assert found.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert (found.family, found.blocks, found.hidden_size, found.vocab_size) == ("custom_gpt:gpt", 2, 32, VOCAB)
    assert (found.max_positions, found.tied_embeddings, found.largest_tensor) == (64, True, VOCAB * 32)


def test_before_the_data_are_built_the_vocabulary_is_the_one_asked_for() -> None:
    assert facts(recipe(), Site()).vocab_size == 300


def test_on_meta_it_stays_tied_and_its_buffers_have_values() -> None:
    model = meta_model(config_for(recipe(), Site(), Card()), "fp64")
    assert all(parameter.is_meta and parameter.dtype == torch.float64 for parameter in model.parameters())
    assert tied_names(model) == {"module.head.weight": "module.tokens.weight"}
    assert torch.equal(model.module.order, torch.arange(64))
    assert [type(block).__name__ for block in blocks(model)] == ["Block", "Block"]


def test_operations_of_a_token() -> None:
    """The tied table is multiplied with as the head; positions are only looked up."""
    arithmetic = arithmetic_of(meta_model(config_for(recipe(), Site(), Card()), "fp32"))
    assert arithmetic.used == arithmetic.parameters - 64 * 32
    assert arithmetic.attention == 2 * 32


def test_weights_follow_the_seed_the_name_and_the_models_own_rules() -> None:
    weights = weights_of(recipe())
    first, second = (weights[f"module.blocks.{i}.attention.qkv.weight"] for i in (0, 1))
    assert first.std() == pytest.approx(0.02, rel=0.1) and not torch.equal(first, second)
    assert torch.equal(first, weights_of(recipe(layers=1))["module.blocks.0.attention.qkv.weight"])
    assert torch.equal(weights["module.blocks.0.gain"], torch.ones(32))
    assert torch.equal(weights["module.norm.weight"], torch.ones(32)), "by its layer's reset_parameters"


@pytest.mark.parametrize(
    ("fault", "words"), [("leaks", "lets a document see another one"), ("sees ahead", "it sees ahead: the scores of a token")]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_mixes_documents_or_sees_ahead_is_refused_at_the_start(fault: str, words: str, precision: str) -> None:
    with pytest.raises(ModelError, match=words):
        probe(recipe(faults=[fault], precision=precision))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_one_that_does_neither_passes(precision: str) -> None:
    probe(recipe(precision=precision))


def probe(chosen: Recipe) -> None:
    config = config_for(chosen, Site(), Card())
    model = meta_model(config, chosen.precision)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    engine = make_engine(Case().layout(), chosen, model, torch.device("cpu"))
    check_custom(engine, shapes, VOCAB, 64)


def test_rows_longer_than_its_positions_are_refused() -> None:
    with pytest.raises(ModelError, match=r"data\.sequence_length is 65, but the model has 64 positions"):
        config_for(recipe(sequence_length=65), Site(), Card())


def test_a_factory_that_cannot_be_used_is_refused() -> None:
    for factory, words in {
        "no_such_module:gpt": "no_such_module:gpt cannot be imported: ModuleNotFoundError: No module named",
        "custom_gpt:no_such": "custom_gpt:no_such cannot be imported",
        "math:sqrt": r"math:sqrt\(vocab_size=97, \*\*options\) raised TypeError",
        "builtins:dict": "builtins:dict returned dict; it must be a torch.nn.Module",
    }.items():
        with pytest.raises(ModelError, match=words):
            config_for(recipe(factory), Site(), Card())


def test_a_module_that_breaks_as_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_python_in_here.py").write_text("def gpt(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match="no_python_in_here:gpt cannot be imported: SyntaxError"):
        config_for(recipe("no_python_in_here:gpt"), Site(), Card())


@contextmanager
def offered(make: Any) -> Iterator[None]:
    """``make`` is the factory ``custom_gpt:offered`` meanwhile."""
    custom_gpt.offered = make  # type: ignore[attr-defined]
    yield
    del custom_gpt.offered  # type: ignore[attr-defined]


class Bare(nn.Module):
    """Has nothing of what is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.BatchNorm1d(4)
        self.fixed = nn.Parameter(torch.ones(3), requires_grad=False)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("table", torch.empty(3), persistent=False)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return token_ids


def test_all_that_it_lacks_is_named_at_once() -> None:
    with offered(lambda vocab_size: Bare()), pytest.raises(ModelError) as caught:
        config_for(recipe("custom_gpt:offered"), Site(), Card())
    for words in (
        "attribute 'blocks' is missing",
        "attribute 'max_positions' is missing",
        "attribute 'hidden_size' is missing",
        "its forward does not take (token_ids, segments, positions)",
        "parameter fixed has requires_grad False",
        "buffer layer.running_mean is in the state dict",
        "buffer table has no values",
        "drop is a dropout of 0.1",
    ):
        assert words in str(caught.value)


class Odd(custom_gpt.Gpt):
    """Sound in form; its scores are not."""

    def __init__(self, vocab_size: int, answer: str) -> None:
        super().__init__(vocab_size, 32, 1, 4, 64, ())
        self.answer = answer
        if answer == "unset":
            self.loose = nn.Parameter(torch.zeros(3))

    def forward(self, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> Any:
        scores = super().forward(token_ids, segments, positions)
        return {"pair": (scores, None), "hidden": scores[..., :32], "infinite": scores * math.inf}.get(self.answer, scores)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("pair", r"its forward returned tuple; it must be one tensor of scores, \[1, 16, 97\]"),
        ("hidden", r"its forward returned \[1, 16, 32\]"),
        ("infinite", "its scores are not finite"),
    ],
)
def test_scores_that_are_none_are_refused_at_the_start(answer: str, words: str) -> None:
    with offered(lambda vocab_size: Odd(vocab_size, answer)), pytest.raises(ModelError, match=words):
        probe(recipe("custom_gpt:offered"))


def test_a_parameter_that_no_rule_sets_is_named() -> None:
    with offered(lambda vocab_size: Odd(vocab_size, "unset")), pytest.raises(ModelError, match=r"sets module\.loose"):
        weights_of(recipe("custom_gpt:offered"))


def test_a_kernel_of_attention_is_not_chosen_for_it() -> None:
    chosen = recipe().model_copy(update={"attention": "sdpa"})
    assert [refusal.asked for refusal in refusals(chosen, "cpu")] == ["attention with model.kind custom"]
