"""The loss some tokens at a time against the loss of all scores at once: the same numbers, and never all scores in memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from engine_cases import LENGTH, STEPS, Case, Outcome, born_engine, born_model, rows_of_steps, train, trained_steps
from packed import batch, document
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from outgrow.contracts import IGNORE_INDEX
from outgrow.errors import ModelError
from outgrow.trainers.engines import unmarked
from outgrow.trainers.engines.forward import counted_positions
from outgrow.trainers.head_loss import ChunkedNll, LigerNll, soft_capped
from outgrow.trainers.objective import weighted_nll

TOKENS, WIDTH, VOCABULARY = 37, 12, 53
CHUNKS = [1, 8, 37, 1000]


@dataclass
class Given:
    """A head and what it is asked."""

    head: nn.Linear
    hidden: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor


def given(dtype: torch.dtype, *, bias: bool = False) -> Given:
    torch.manual_seed(3)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[[2, 20]] = IGNORE_INDEX
    hidden = 4 * torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    return Given(head, hidden.to(dtype).requires_grad_(), targets, torch.rand(TOKENS))


def whole(of: Given, cap: float | None) -> list[torch.Tensor | None]:
    loss = weighted_nll(soft_capped(of.head(of.hidden), cap), of.targets, of.weights)
    return with_gradients(of, loss)


def chunked(of: Given, cap: float | None, tokens: int) -> list[torch.Tensor | None]:
    return with_gradients(of, ChunkedNll(tokens, cap)(of.head, of.head.forward, of.hidden, of.targets, of.weights))


def with_gradients(of: Given, loss: torch.Tensor) -> list[torch.Tensor | None]:
    """The loss and the gradients of its seventh part to hidden states, weight and bias."""
    leaves = [of.hidden, *of.head.parameters()]
    for leaf in leaves:
        leaf.grad = None
    torch.autograd.backward(loss / 7)
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


def same(found: list[torch.Tensor | None], expected: list[torch.Tensor | None], tolerance: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert mine.dtype == theirs.dtype
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", CHUNKS)
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_loss_and_gradients_are_those_of_all_scores(
    tokens: int, cap: float | None, dtype: torch.dtype, tolerance: float
) -> None:
    for bias in (False, True):
        of = given(dtype, bias=bias)
        same(chunked(of, cap, tokens), whole(of, cap), tolerance)


def test_the_gradient_of_the_weight_adds_up_in_float32() -> None:
    """200 chunks of 1 token: in bfloat16 the later ones would be lost in the sum of the earlier."""
    torch.manual_seed(0)
    head = nn.Linear(4, 3, bias=False).bfloat16()
    of = Given(head, torch.ones(2000, 4, dtype=torch.bfloat16).requires_grad_(), torch.zeros(2000).long(), torch.ones(2000))
    found, expected = chunked(of, None, 1)[2], whole(of, None)[2]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(trained: str) -> None:
    of = given(torch.float64)
    of.hidden.requires_grad_(trained == "hidden")
    of.head.weight.requires_grad_(trained == "weight")
    found = chunked(of, None, 8)
    assert [gradient is not None for gradient in found[1:]] == [trained == "hidden", trained == "weight"]
    same(found, whole(of, None), 1e-13)


def test_a_head_with_an_adapter_is_called_for_every_chunk() -> None:
    class Adapted(nn.Linear):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden) + hidden.sum(-1, keepdim=True)

    of = given(torch.float64)
    of.head = Adapted(WIDTH, VOCABULARY, dtype=torch.float64)
    for cap in (None, 5.0):
        same(chunked(of, cap, 8), whole(of, cap), 1e-13)


def test_no_token_at_all_gives_zeros() -> None:
    of = given(torch.float32)
    empty = Given(of.head, torch.zeros(0, WIDTH, requires_grad=True), of.targets[:0], of.weights[:0])
    loss, hidden, weight = chunked(empty, None, 8)
    assert loss is not None and hidden is not None and weight is not None
    assert (loss.item(), hidden.shape, weight.count_nonzero().item()) == (0.0, (0, WIDTH), 0)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


def test_never_more_than_a_chunk_of_scores() -> None:
    of = given(torch.float32)
    with Largest() as seen:
        chunked(of, 5.0, 14)
    assert seen.elements == 14 * VOCABULARY
    with Largest() as seen:
        whole(of, 5.0)
    assert seen.elements == TOKENS * VOCABULARY


@pytest.mark.parametrize("num_counted", [0, 1, 16, 17, 24, 25, 32])
def test_positions_without_target_are_left_out_where_that_saves_a_chunk(num_counted: int) -> None:
    targets = torch.full((32,), IGNORE_INDEX)
    targets[torch.randperm(32, generator=torch.Generator().manual_seed(1))[:num_counted]] = 5
    found = counted_positions(targets, 8)
    if num_counted > 24:
        assert found is None
    else:
        assert found is not None and found.tolist() == [i for i in range(32) if targets[i] == 5]


CHUNKED = {"cross_entropy": {"kind": "chunked", "tokens": 50}}


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_twenty_steps_are_those_of_all_scores(family: str) -> None:
    """Gemma 2 caps its scores and ties its head to the embedding."""
    expected, found = train(Case(family=family)), train(Case(family=family, settings=CHUNKED))
    close(found, expected, 1e-9)
    assert found.validation == pytest.approx(expected.validation, abs=1e-9)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 5e-3)])
def test_twenty_steps_in_less_precision(precision: str, tolerance: float) -> None:
    close(train(Case(precision=precision, settings=CHUNKED)), train(Case(precision=precision)), tolerance)


def close(found: Outcome, expected: Outcome, tolerance: float) -> None:
    assert len(found.losses) == STEPS
    assert found.losses == pytest.approx(expected.losses, rel=0, abs=tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=0, abs=tolerance)


def test_a_rank_without_rows_gives_zero_gradients_to_all() -> None:
    engine = born_engine(Case(settings=CHUNKED))
    engine.accumulate(batch([], LENGTH), 10.0, unmarked)
    sums = engine.finish()
    assert (sums.loss.item(), sums.grad_norm.item()) == (0.0, 0.0)


def test_scores_of_last_tokens_alone_are_made() -> None:
    rows = batch(rows_of_steps()[0], LENGTH)
    engine = born_engine(Case(family="gemma2"))
    with Largest() as seen:
        found = engine.logits(rows.token_ids, rows.segments, rows.positions)
    assert found.shape == (8, 97) and found.dtype == torch.float32
    assert seen.elements < 8 * LENGTH * 97
    longer = replace(rows, **{name: torch.cat([getattr(rows, name)] * 2) for name in ("token_ids", "segments", "positions")})
    again = engine.logits(longer.token_ids, longer.segments, longer.positions)
    torch.testing.assert_close(again[:8], found)


def test_a_family_that_is_not_tested_is_refused_by_name() -> None:
    from outgrow.trainers.engines.forward import head_loss

    class Model:
        class config:  # noqa: N801
            model_type = "cohere"

    with pytest.raises(ModelError, match=r"chunked is not known to be right for cohere.*llama"):
        head_loss(Model(), Case(settings=CHUNKED).recipe())  # type: ignore[arg-type]


LIGER = {"cross_entropy": {"kind": "liger"}}


def test_liger_that_is_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from outgrow.trainers.head_loss import liger_nll

    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ModelError, match="liger, which cannot be imported") as raised:
        liger_nll(nn.Linear(2, 3), None)
    assert "pip install liger-kernel" in str(raised.value)


@pytest.fixture
def slow_liger(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A stand-in for Liger's module that takes what it takes; says with which options it was made."""
    options: dict[str, Any] = {}

    class LigerFusedLinearCrossEntropyLoss:
        def __init__(self, ignore_index: int, reduction: str, softcap: float | None, accum_dtype: Any = None) -> None:
            options.update(ignore_index=ignore_index, reduction=reduction, softcap=softcap, accum_dtype=accum_dtype)

        def __call__(self, weight: torch.Tensor, hidden: torch.Tensor, targets: torch.Tensor, bias: Any) -> torch.Tensor:
            scores = soft_capped(nn.functional.linear(hidden, weight, bias), options["softcap"])
            return nn.functional.cross_entropy(scores, targets, ignore_index=options["ignore_index"], reduction="sum")

    package, module = ModuleType("liger_kernel"), ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = LigerFusedLinearCrossEntropyLoss  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    yield options


def test_liger_is_given_what_it_takes(slow_liger: dict[str, Any]) -> None:
    from outgrow.trainers.head_loss import liger_nll

    loss = liger_nll(nn.Linear(2, 3), 5.0)
    assert slow_liger == {"ignore_index": IGNORE_INDEX, "reduction": "sum", "softcap": 5.0, "accum_dtype": torch.float32}
    of = given(torch.float32)
    of.weights = torch.where(torch.arange(TOKENS) % 3 == 0, 0.0, 0.25)
    targets = loss.readied(of.targets, of.weights)
    found = loss(of.head, of.head.forward, of.hidden, targets, of.weights)
    same(with_gradients(of, found), whole(of, 5.0), 1e-5)


def test_liger_refuses_a_head_with_an_adapter() -> None:
    from outgrow.trainers.engines.forward import head_loss

    adapter = {"kind": "lora", "rank": 2, "targets": ["lm_head"]}
    with pytest.raises(ModelError, match="liger, which takes a head without an adapter"):
        head_loss(born_model(Case(adapter=adapter)), Case(settings=LIGER).recipe())


def test_liger_refuses_targets_of_unlike_weights() -> None:
    loss = LigerNll(lambda *args: torch.zeros(()))
    with pytest.raises(ModelError, match=r"weights of this batch go from 0.5 to 0.75") as raised:
        loss.readied(torch.tensor([1, 2, 3]), torch.tensor([0.5, 0.75, 0.0]))
    assert "chunked" in str(raised.value)


def test_liger_on_a_cpu_is_refused() -> None:
    from outgrow.errors import PlanError

    with pytest.raises((PlanError, ModelError), match="liger"):
        born_engine(Case(settings=LIGER))


def test_one_document_a_row_gives_what_masks_give() -> None:
    """Rows of one document need no mask; a micro-batch with a packed row besides takes the other way."""
    generator = torch.Generator().manual_seed(5)
    rows = [[document(generator, length, 97)] for length in (24, 20, 3, 24)]
    packed = [*rows[:3], [document(generator, 10, 97), document(generator, 14, 97)]]
    case = Case(precision="fp32")

    def steps(*batches: Any) -> tuple[float, float]:
        engine = born_engine(case)
        for part in batches:
            engine.accumulate(batch(part, LENGTH), 10.0, unmarked)
        sums = engine.finish()
        return sums.loss.item(), sums.grad_norm.item()

    assert steps(rows[:3], packed[3:]) == pytest.approx(steps(packed), abs=1e-6)
    assert list(trained_steps(born_engine(case), case, 0, [rows[:2]]))
