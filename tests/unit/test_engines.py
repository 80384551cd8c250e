"""What engines promise beyond equal losses: names that never change, resume that is bit-equal, zeros where no token came."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from engine_cases import LENGTH, STEPS, Case, born_engine, born_model, parameters_digest, rows_of_steps, trained_steps
from packed import Row, batch
from torch import nn

from outgrow.contracts import Batch, StepRows
from outgrow.errors import PlanError
from outgrow.recipes.schema.optimizer import AdamW
from outgrow.trainers.bring_up import first_weights
from outgrow.trainers.engines import make_engine, unmarked
from outgrow.trainers.engines.ddp import GradientSums, _buckets
from outgrow.trainers.optimizers.adamw import NamedAdamW
from outgrow.trainers.regions import Region, local_part
from outgrow.trainers.validation import validate


class Kept:
    """Tensors that were copied aside, as a ``TensorSource``."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        self._tensors = {prefix + name: local_part(tensor)[0].clone() for name, tensor in tensors.items()}

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, region: Region) -> torch.Tensor:
        return self._tensors[name][region.slices]


@pytest.fixture
def no_group_left() -> Iterator[None]:
    """FSDP2 on one rank makes a process group of its own, which who started the rank ends."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("no_group_left")
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"parallel": {"kind": "fsdp2"}}], ids=["plain", "fsdp2 alone"])
def test_going_on_from_kept_tensors_is_bit_equal_to_going_straight_through(precision: str, settings: dict[str, object]) -> None:
    case = Case(engine="fsdp2" if settings else "plain", precision=precision, micro_rows=3, settings=settings)
    rows, halt = rows_of_steps(), 7
    engine = born_engine(case)
    list(trained_steps(engine, case, 0, rows[:halt]))
    kept = Kept(engine.tensors())
    straight = list(trained_steps(engine, case, 0, rows[halt:], first=halt))
    resumed = born_engine(case)
    resumed.load(kept)
    assert list(trained_steps(resumed, case, 0, rows[halt:], first=halt)) == straight
    assert parameters_digest(resumed) == parameters_digest(engine)
    assert len(straight) == STEPS - halt


@pytest.mark.usefixtures("no_group_left")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("engine", ["plain", "fsdp2"])
def test_what_is_frozen_is_not_kept_and_comes_from_the_base_again(engine: str, precision: str) -> None:
    settings = {} if engine == "plain" else {"parallel": {"kind": "fsdp2"}}
    case = Case(engine=engine, precision=precision, adapter={"kind": "lora", "rank": 2}, settings=settings)
    rows, halt = rows_of_steps()[:6], 4
    model = born_model(case)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name: parameter.dtype for name, parameter in model.named_parameters() if not parameter.requires_grad}
    through = born_engine(case)
    tensors = through.tensors()
    assert {name.removeprefix("model/") for name in tensors if name.startswith("model/")} == trained
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert set(frozen.values()) == {torch.bfloat16 if precision == "bf16" else torch.float32}
    list(trained_steps(through, case, 0, rows[:halt]))
    kept = Kept(through.tensors())
    straight = list(trained_steps(through, case, 0, rows[halt:], first=halt))
    resumed = make_engine(case.layout(), case.recipe(), model, torch.device("cpu"))
    resumed.load(kept)
    resumed.load_frozen(first_weights(case.recipe(), case.site(), case.config(), model))
    assert list(trained_steps(resumed, case, 0, rows[halt:], first=halt)) == straight
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


@pytest.mark.usefixtures("no_group_left")
def test_weights_of_tokens_are_not_rounded_with_the_model() -> None:
    """0.3 is no bfloat16; they pass through the model on their way to a loss in parts."""
    chunked = {"cross_entropy": {"kind": "chunked", "tokens": 16}}
    found = []
    for engine, settings in (("plain", chunked), ("fsdp2", chunked | {"parallel": {"kind": "fsdp2"}})):
        trainer = born_engine(Case(engine=engine, precision="bf16", settings=settings))
        packed = batch(rows_of_steps()[0], LENGTH)
        trainer.accumulate(replace(packed, weights=packed.weights * 0.3), 1.0, unmarked)
        sums = trainer.finish()
        found.append((sums.loss.item(), sums.grad_norm.item()))
    assert found[0] == found[1]


def test_gradients_are_summed_in_buckets_of_one_type_in_their_order() -> None:
    def parameter(numel: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
        return nn.Parameter(torch.empty(numel, dtype=dtype))

    given = [parameter(2), parameter(2), parameter(9), parameter(1), parameter(1, torch.float64), parameter(1, torch.float64)]
    buckets = _buckets(given, most_bytes=16)
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in given]
    assert [len(bucket) for bucket in buckets] == [2, 1, 1, 2]
    assert _buckets([], most_bytes=16) == []


def test_a_gradient_that_is_a_bucket_by_itself_is_summed_where_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(message: torch.Tensor, async_op: bool) -> SimpleNamespace:
        message.mul_(2)
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(dist, "all_reduce", doubled)
    large, turned, small, unused = (nn.Parameter(torch.zeros(shape)) for shape in ((4, 3), (3, 4), (2,), (2,)))
    sums = GradientSums([(p, p) for p in (unused, small, turned, large)], bucket_bytes=24)
    sums.begin()
    large.grad, turned.grad, small.grad = torch.ones(4, 3), torch.arange(12.0).view(4, 3).T, torch.ones(2)
    where = large.grad.data_ptr()
    sums.finish()
    assert large.grad.data_ptr() == where
    assert torch.equal(large.grad, torch.full((4, 3), 2.0))
    assert torch.equal(turned.grad, 2 * torch.arange(12.0).view(4, 3).T)
    assert torch.equal(small.grad, torch.full((2,), 2.0))
    assert unused.grad is not None and not unused.grad.any()


def test_what_does_not_go_together_is_refused_before_there_is_an_engine() -> None:
    case = Case(engine="zero", precision="fp64", settings={"parallel": {"kind": "zero"}})
    with pytest.raises(PlanError, match="precision fp64 with parallel.kind zero"):
        make_engine(case.layout(), case.recipe(), born_model(case), torch.device("cpu"))


@pytest.mark.parametrize("stage", [1, 2])
def test_experts_whose_gradients_deepspeed_would_mix_up_are_refused(stage: int) -> None:
    parallel = {"parallel": {"kind": "zero", "stage": stage}}
    with pytest.raises(PlanError, match="a mixture of experts with parallel.stage 1 or 2 on several ranks"):
        born_engine(Case(family="mixtral", engine="zero", shard=2, precision="fp32", settings=parallel))


def test_weights_alone_leave_the_optimizer_new() -> None:
    case = Case(precision="fp32")
    engine = born_engine(case)
    list(trained_steps(engine, case, 0, rows_of_steps()[:3]))
    fresh = born_engine(case)
    fresh.load_model(
        Kept({n.removeprefix("model/"): t for n, t in engine.tensors().items() if n.startswith("model/")}, "w/"), "w/"
    )
    assert parameters_digest(fresh) == parameters_digest(engine)
    assert not any(tensor.any() for name, tensor in fresh.tensors().items() if name.startswith("optim/"))


@pytest.mark.usefixtures("no_group_left")
@pytest.mark.parametrize("reshard", [True, False])
def test_what_is_loaded_after_an_evaluation_is_what_computes(reshard: bool) -> None:
    case = Case(engine="fsdp2", settings={"parallel": {"kind": "fsdp2", "reshard_after_forward": reshard}})
    rows, engine = rows_of_steps(), born_engine(case)
    born = Kept(engine.tensors())
    expected = list(trained_steps(engine, case, 0, rows[:2]))
    engine.evaluate(batch(rows[0], LENGTH))
    engine.load(born)
    assert list(trained_steps(engine, case, 0, rows[:2])) == expected


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_names_shapes_and_types_of_tensors_never_change(family: str) -> None:
    case = Case(family=family, precision="bf16")
    engine = born_engine(case)

    def described() -> dict[str, tuple[torch.Size, torch.dtype]]:
        return {name: (tensor.shape, tensor.dtype) for name, tensor in engine.tensors().items()}

    at_first = described()
    list(trained_steps(engine, case, 0, rows_of_steps()[:2]))
    assert described() == at_first
    assert {dtype for _, dtype in at_first.values()} == {torch.float32}
    parameters = [name.removeprefix("model/") for name in at_first if name.startswith("model/")]
    states = {f"optim/{name}/{state}" for name in parameters for state in ("step", "exp_avg", "exp_avg_sq")}
    assert set(at_first) == states | {f"model/{name}" for name in parameters}
    assert ("lm_head.weight" in parameters) == (family != "gemma2"), "tied parameters stand once"


def test_checkpoint_tensors_are_views_of_what_is_trained() -> None:
    case = Case(precision="bf16")
    engine = born_engine(case)
    tensors = engine.tensors()
    list(trained_steps(engine, case, 0, rows_of_steps()[:1]))
    assert all(torch.equal(tensor, engine.tensors()[name]) for name, tensor in tensors.items())
    assert not any(tensor.requires_grad for tensor in tensors.values())


def test_a_rank_without_rows_adds_nothing() -> None:
    case = Case()
    engine = born_engine(case)
    engine.accumulate(batch([], LENGTH), 10.0, unmarked)
    sums = engine.finish()
    assert (sums.loss.item(), sums.grad_norm.item()) == (0.0, 0.0)


def test_evaluation_changes_nothing() -> None:
    case = Case(precision="bf16")
    watched, alone = born_engine(case), born_engine(case)
    rows = rows_of_steps()[:4]
    for step in range(len(rows)):
        watched.evaluate(batch(rows[-1], LENGTH))
        seen = list(trained_steps(watched, case, 0, rows[step : step + 1], first=step))
        assert seen == list(trained_steps(alone, case, 0, rows[step : step + 1], first=step))


def test_a_parameter_without_gradient_is_updated_as_if_it_were_zero() -> None:
    def parameters() -> dict[str, nn.Parameter]:
        return {"met": nn.Parameter(torch.ones(2, 2)), "unmet": nn.Parameter(torch.ones(2, 2))}

    left_out, zeroed = parameters(), parameters()
    settings = AdamW(learning_rate=0.1, weight_decay=0.5)
    for named in (left_out, zeroed):
        optimizer = NamedAdamW(named, settings)
        for step in range(3):
            named["met"].grad = torch.full((2, 2), 0.1)
            if named is zeroed or step == 0:
                named["unmet"].grad = torch.full((2, 2), 0.0 if step else 0.2)
            optimizer.step(0.1, optimizer.squared_norm().sqrt())
    assert torch.equal(left_out["unmet"], zeroed["unmet"])


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 100.0])
def test_clipping_is_that_of_torch(clip_norm: float) -> None:
    gradients = [torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([3.0, -4.0])]
    ours = {str(i): nn.Parameter(torch.zeros_like(g)) for i, g in enumerate(gradients)}
    theirs = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip([*ours.values(), *theirs], gradients * 2, strict=True):
        parameter.grad = gradient.clone()
    optimizer = NamedAdamW(ours, AdamW(learning_rate=1.0, betas=(0.9, 0.95), clip_norm=clip_norm, weight_decay=0))
    norm = optimizer.squared_norm().sqrt()
    expected = torch.nn.utils.clip_grad_norm_(theirs, clip_norm or float("inf"))
    torch.testing.assert_close(norm, expected)
    optimizer.step(0.0, norm)
    for name, parameter in zip(ours, theirs, strict=True):
        moment = optimizer.tensors()[f"optim/{name}/exp_avg"]
        torch.testing.assert_close(moment, parameter.grad * 0.1)


def test_validation_is_weighted_over_targets_not_over_batches_or_streams() -> None:
    case = Case()
    engine = born_engine(case)
    rows = [documents for step in rows_of_steps()[:3] for documents in step]
    parts = {"a": [rows[:8], rows[8:9]], "b": [rows[9:12]]}
    given = [(stream, step_rows([batch(part, LENGTH), batch([], LENGTH)])) for stream in parts for part in parts[stream]]
    found = validate(engine, given)
    assert found is not None

    def one_by_one(rows: list[Row]) -> float:
        sums = [torch.stack(engine.evaluate(batch([[document]], LENGTH))) for documents in rows for document in documents]
        nll, weight = torch.stack(sums).sum(0).tolist()
        return float(nll / weight)

    assert found.total == pytest.approx(one_by_one(rows[:12]), abs=1e-12)
    assert found.streams == pytest.approx({"a": one_by_one(rows[:9]), "b": one_by_one(rows[9:12])}, abs=1e-12)
    assert validate(engine, []) is None
    assert validate(engine, [("a", step_rows([batch([], LENGTH)]))]) is None


def step_rows(micro_batches: list[Batch]) -> StepRows:
    return StepRows(step=0, epoch=0, row_ids=(), global_weight=0.0, tokens=0, micro_batches=tuple(micro_batches))
