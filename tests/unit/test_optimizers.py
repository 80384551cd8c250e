"""The optimizers against slow twins and torch's own, whole and sharded, and what they keep."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from engine_cases import STEPS, Case, born_engine, parameters_digest, rows_of_steps, trained_steps
from optimizer_cases import IN_BLOCKS, KINDS, Kept, give, gradients, moved, parameters
from torch import nn

from outgrow.recipes.schema import optimizer as settings
from outgrow.trainers.optimizers import adamw_8bit, make_optimizer
from outgrow.trainers.optimizers.eight_bit import BLOCK, codebook, decode, encode
from outgrow.trainers.optimizers.muon import orthogonal, scale


def clipped(found: dict[str, torch.Tensor], clip_norm: float) -> dict[str, torch.Tensor]:
    norm = torch.sqrt(sum(gradient.double().square().sum() for gradient in found.values()))  # type: ignore[arg-type]
    return {name: gradient * min(1.0, clip_norm / (float(norm) + 1e-6)) for name, gradient in found.items()}


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_dettmers(signed: bool) -> None:
    theirs = torch.as_tensor(create_dynamic_map(signed=signed), dtype=torch.float32)
    torch.testing.assert_close(codebook(signed, torch.device("cpu")), theirs, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("length", [1, 255, 256, 257, 600])
def test_coding_is_the_slow_twin(signed: bool, length: int) -> None:
    values = torch.randn(3, length, generator=torch.Generator().manual_seed(2)) ** 3
    values = values if signed else values.abs()
    values[1] = 0
    codes, scales = encode(values, signed)
    assert codes.shape == values.shape and scales.shape == (3, -(-length // BLOCK))
    book = codebook(signed, values.device)
    for row in range(3):
        for start in range(0, length, BLOCK):
            part = values[row, start : start + BLOCK]
            largest = part.abs().max()
            assert scales[row, start // BLOCK] == largest
            for at, value in enumerate(part):
                distances = (book * largest - value).abs()
                found = distances[int(codes[row, start + at])]
                assert found <= distances.min() + 1e-6 * largest
    decoded = decode(codes, scales, signed)
    torch.testing.assert_close(decoded, book[codes.int()] * scales.repeat_interleave(BLOCK, 1)[:, :length])
    assert not decoded[1].any()


def slow_adamw_8bit(name: str, steps: int, chosen: settings.AdamW8bit) -> torch.Tensor:
    """One parameter, by the formulas; what is kept between steps has been through codes."""
    value = parameters()[name].detach().clone()
    average, root = torch.zeros_like(value), torch.zeros_like(value)
    beta1, beta2 = chosen.betas
    for step in range(steps):
        gradient = clipped(gradients(step), chosen.clip_norm)[name]
        average = beta1 * average + (1 - beta1) * gradient
        root = (beta2 * root**2 + (1 - beta2) * gradient**2).sqrt()
        rate = chosen.learning_rate / (step + 1)
        value *= 1 - rate * chosen.weight_decay
        value -= rate * (average / (1 - beta1 ** (step + 1))) / (root / (1 - beta2 ** (step + 1)) ** 0.5 + chosen.eps)
        average, root = (
            decode(*encode(state.flatten(1), signed), signed).view(value.shape)
            for state, signed in ((average, True), (root, False))
        )
    return value


@pytest.mark.parametrize("name", ["embed", "block.matrix", "block.experts"])
def test_eight_bits_are_the_slow_twin(name: str) -> None:
    chosen = KINDS["adamw_8bit"]
    assert isinstance(chosen, settings.AdamW8bit)
    named, optimizer = moved("adamw_8bit")
    torch.testing.assert_close(named[name].detach(), slow_adamw_8bit(name, 5, chosen), rtol=1e-5, atol=1e-6)
    states = {state: tensor for state, tensor in optimizer.tensors().items() if state.startswith(f"optim/{name}/")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in states.values())
    assert 2 * named[name].numel() < size < 2.2 * named[name].numel()


@pytest.mark.parametrize("name", ["block.norm", "block.small"])
def test_small_tensors_are_kept_in_float32(name: str) -> None:
    """Exactly AdamW's, with its names of states."""
    named, optimizer = moved("adamw_8bit")
    wanted = parameters()
    adamw = make_optimizer(wanted, settings.AdamW(learning_rate=1e-2, clip_norm=0.5), IN_BLOCKS)
    for step in range(5):
        give(wanted, gradients(step))
        adamw.step(1e-2 / (step + 1), adamw.squared_norm().sqrt())
    assert torch.equal(named[name], wanted[name])
    assert {state.rsplit("/")[-1] for state in optimizer.tensors() if f"/{name}/" in state} == {"step", "exp_avg", "exp_avg_sq"}


@pytest.fixture
def all_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors of the cases' tiny models too."""
    monkeypatch.setattr(adamw_8bit, "SMALLEST", 1)


@pytest.mark.usefixtures("all_in_eight_bits")
def test_the_norm_of_a_large_gradient_is_that_of_float64() -> None:
    """On a CPU a plain float32 sum of so many squares is 8e-5 off."""
    weight = nn.Parameter(torch.zeros(2048, 2048))
    weight.grad = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(1))
    optimizer = make_optimizer({"weight": weight}, settings.AdamW(learning_rate=1e-2), [])
    assert optimizer.squared_norm().sqrt().item() == pytest.approx(weight.grad.double().norm().item(), rel=1e-6)


def test_eight_bits_follow_float32() -> None:
    """20 steps of a model that learns: the difference of losses stays under a hundredth of what was learned."""

    def losses(kind: str) -> list[float]:
        # Tensors of the usual case are so small that 8 bits would keep them in float32.
        sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32}
        case = Case(precision="fp32", sizes=sizes, settings={"optimizer": {"kind": kind, "learning_rate": 3e-3}})
        return [loss for loss, _ in trained_steps(born_engine(case), case, 0, rows_of_steps())]

    exact, coded = losses("adamw"), losses("adamw_8bit")
    learned = exact[0] - exact[-1]
    assert learned > 0.3
    drift = max(abs(a - b) for a, b in zip(exact, coded, strict=True))
    assert 1e-6 < drift < 0.01 * learned


def slow_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Each singular value through the five quintics by itself."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", [(12, 12), (40, 9), (9, 40)])
def test_newton_schulz_is_the_slow_twin(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = orthogonal(matrix)
    torch.testing.assert_close(found, slow_orthogonal(matrix), rtol=0, atol=1e-9)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3
    stack = torch.stack([matrix, matrix * 1e-3, torch.zeros_like(matrix)])
    each = orthogonal(stack)
    torch.testing.assert_close(each[1], found, rtol=0, atol=1e-9)
    assert not each[2].any()


def test_muon_is_that_of_torch_but_for_rounding() -> None:
    """torch's rounds its steps to bfloat16."""
    chosen = KINDS["muon"]
    assert isinstance(chosen, settings.Muon)
    named, _ = moved("muon")
    wanted = parameters()["block.matrix"]
    theirs = torch.optim.Muon(
        [wanted], lr=1e-2, weight_decay=chosen.weight_decay, momentum=chosen.momentum, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(5):
        wanted.grad = clipped(gradients(step), chosen.clip_norm)["block.matrix"]
        theirs.param_groups[0]["lr"] = chosen.learning_rate / (step + 1)
        theirs.step()
    difference = (named["block.matrix"] - wanted).norm() / (wanted - parameters()["block.matrix"]).norm()
    assert difference < 0.02


def test_an_update_of_muon_has_the_size_of_one_of_adamw() -> None:
    update = orthogonal(torch.randn(64, 256)) * scale(torch.Size((64, 256)))
    assert 0.1 < update.square().mean().sqrt() < 0.3


def test_muon_moves_matrices_in_blocks_and_adamw_the_rest() -> None:
    named, optimizer = moved("muon")
    states: dict[str, set[str]] = {}
    for name in optimizer.tensors():
        if name.startswith("optim/"):
            _, parameter, state = name.split("/")
            states.setdefault(parameter, set()).add(state)
    adamw = {"step", "exp_avg", "exp_avg_sq"}
    muon = {"momentum"}
    assert states == {
        "embed": adamw, "block.matrix": muon, "block.experts": muon, "block.norm": adamw, "block.small": muon
    }  # fmt: skip
    wanted = parameters()
    chosen = settings.AdamW(learning_rate=3e-3, clip_norm=0.5)
    other = make_optimizer(wanted, chosen, [])
    for step in range(5):
        give(wanted, gradients(step))
        other.step(3e-3 / (step + 1), other.squared_norm().sqrt())
    assert torch.equal(named["embed"], wanted["embed"]), "the same share of its own learning rate"


def test_each_expert_is_a_matrix_of_its_own() -> None:
    named, _ = moved("muon", steps=1)
    alone = {"block.expert": nn.Parameter(parameters()["block.experts"].detach()[1].clone())}
    optimizer = make_optimizer(alone, settings.Muon(kind="muon", learning_rate=1e-2, clip_norm=0), ["block.expert"])
    alone["block.expert"].grad = clipped(gradients(0), 0.5)["block.experts"][1]
    optimizer.step(1e-2, optimizer.squared_norm().sqrt())
    torch.testing.assert_close(named["block.experts"][1], alone["block.expert"])


@pytest.mark.usefixtures("all_in_eight_bits")
@pytest.mark.parametrize("kind", ["adamw_8bit", "muon"])
@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_going_on_from_kept_tensors_is_bit_equal(kind: str, precision: str) -> None:
    case = Case(precision=precision, settings={"optimizer": {"kind": kind, "learning_rate": 3e-3}})
    rows = rows_of_steps()[:6]
    engine = born_engine(case)
    list(trained_steps(engine, case, 0, rows[:3]))
    aside = Kept(engine.tensors())
    names = set(engine.tensors())
    straight = list(trained_steps(engine, case, 0, rows[3:], first=3))
    resumed = born_engine(case)
    assert set(resumed.tensors()) == names
    resumed.load(aside)
    assert list(trained_steps(resumed, case, 0, rows[3:], first=3)) == straight
    assert parameters_digest(resumed) == parameters_digest(engine)
    assert STEPS > 6


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.parity)])
def test_shards_move_as_the_whole_does(world: int, tmp_path: Path) -> None:
    """Rows dealt out unevenly, to the last rank none at all of some; what is kept is the same to the bit, or nearly."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    program = [sys.executable, "-W", "error", str(Path(__file__).parent.parent / "optimizer_cases.py")]
    ranks = [subprocess.Popen([*program, str(rank), str(world), str(tmp_path)], env=environment) for rank in range(world)]
    try:
        assert [rank.wait(120) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    worst = json.loads((tmp_path / "worst.json").read_text())
    assert worst["adamw_8bit"] <= 1e-6 and worst["muon"] <= 1e-5
    assert worst["codes that differ"] <= 1e-3
