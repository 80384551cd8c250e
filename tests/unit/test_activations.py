"""What blocks keep for the backward pass: less memory or other memory, and the same losses bit for bit."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_cases import Case, born_engine, rows_of_steps, trained_steps
from tiny_models import FAMILIES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from outgrow.recipes.schema.speed import ActivationCheckpointing, KeepAll, RecomputeBlocks, RecomputeCheap
from outgrow.trainers.engines import offload
from outgrow.trainers.engines.activations import checkpoint_activations
from outgrow.trainers.engines.offload import offload_activations

POLICIES = {
    "all": {"kind": "none"},
    "full": {"kind": "full"},
    "every second block": {"kind": "full", "every": 2},
    "dear operations": {"kind": "selective"},
    "attention": {"kind": "selective", "keep": ["attention"]},
    "half of the products": {"kind": "selective", "keep": ["every_second_matmul", "attention"]},
}


def steps(**settings: Any) -> list[tuple[float, float]]:
    case = Case(precision="fp32", **settings)
    return list(trained_steps(born_engine(case), case, 0, rows_of_steps()[:3]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in ("llama", "gemma2", "mixtral")])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_losses_are_bit_equal(policy: dict[str, Any], family: str) -> None:
    assert steps(family=family, settings={"activation_checkpointing": policy}) == steps(family=family)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


class Block(nn.Module):
    """Four products in a row and something cheap after each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, hidden: torch.Tensor, *, shift: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = torch.tanh(layer(hidden)) + shift
        return hidden


def network(num_blocks: int = 4) -> tuple[list[Block], torch.Tensor]:
    torch.manual_seed(0)
    return [Block() for _ in range(num_blocks)], torch.randn(3, 8)


def through(blocks: list[Block], hidden: torch.Tensor) -> torch.Tensor:
    for block in blocks:
        hidden = block(hidden, shift=torch.ones(8))
    return hidden.square().sum()


@pytest.mark.parametrize(
    ("policy", "again"),
    [
        (KeepAll(), 0),
        (RecomputeBlocks(kind="full"), 16),
        (RecomputeBlocks(kind="full", every=2), 8),
        (RecomputeBlocks(kind="full", every=3), 8),
        (RecomputeCheap(kind="selective"), 0),
        (RecomputeCheap(kind="selective", keep=("attention",)), 16),
        (RecomputeCheap(kind="selective", keep=("every_second_matmul",)), 8),
    ],
    ids=str,
)
def test_a_policy_computes_again_what_it_says(policy: ActivationCheckpointing, again: int) -> None:
    blocks, hidden = network()
    with Products() as kept:
        torch.autograd.backward(through(blocks, hidden))
    blocks, hidden = network()
    checkpoint_activations(blocks, policy)
    with Products() as chosen:
        torch.autograd.backward(through(blocks, hidden))
    assert chosen.count["aten::mm"] - kept.count["aten::mm"] == again


def gradients(prepare: Callable[[list[Block]], None]) -> list[torch.Tensor]:
    blocks, hidden = network()
    prepare(blocks)
    for _ in range(2):
        torch.autograd.backward(through(blocks, hidden))
    return [parameter.grad for block in blocks for parameter in block.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("policy", [KeepAll(), RecomputeBlocks(kind="full"), RecomputeBlocks(kind="full", every=2)], ids=str)
def test_offload_gives_the_same_gradients(policy: ActivationCheckpointing) -> None:
    def prepare(blocks: list[Block]) -> None:
        checkpoint_activations(blocks, policy)
        offload_activations(blocks, smallest=1)

    for found, expected in zip(gradients(prepare), gradients(lambda blocks: None), strict=True):
        assert torch.equal(found, expected)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every piece that is packed."""
    made: list[weakref.ref[Any]] = []

    class Noted(offload._Piece):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(offload, "_Piece", Noted)
    return made


def on_device(pieces: list[weakref.ref[Any]]) -> int:
    return sum(piece()._there is not None for piece in pieces if piece() is not None)


def test_offload_leaves_two_blocks_on_the_device_and_brings_back_one_ahead(pieces: list[weakref.ref[Any]]) -> None:
    """One piece a block: its input, as each is computed again."""
    blocks, hidden = network(num_blocks=6)
    checkpoint_activations(blocks, RecomputeBlocks(kind="full"))
    offload_activations(blocks, smallest=1)
    loss = through(blocks, hidden)
    assert (len(pieces), on_device(pieces)) == (6, 2)
    seen = []
    for block in blocks:
        block.layers[0].weight.register_hook(lambda gradient: seen.append(on_device(pieces)))
    torch.autograd.backward(loss)
    assert seen and max(seen) <= 3
    del loss
    gc.collect()
    assert not any(piece() is not None for piece in pieces), "nothing is held after the backward pass"


def test_parameters_and_what_blocks_share_do_not_travel(pieces: list[weakref.ref[Any]]) -> None:
    """A block saves for each product its input and its weight, and the result of each tanh; the shift is shared."""
    blocks, hidden = network(num_blocks=1)
    offload_activations(blocks, smallest=1)
    loss = through(blocks, hidden)
    # The first input, four results of tanh, and three inputs of later products.
    assert len(pieces) == 8
    assert all(piece()._here.numel() == 24 for piece in pieces)  # type: ignore[union-attr]
    del loss


def test_what_is_saved_twice_travels_once(pieces: list[weakref.ref[Any]]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.first(hidden) + self.second(hidden)

    block = Twice()
    offload_activations([block], smallest=1)
    loss = block(torch.ones(3, 8)).sum()
    assert len(pieces) == 1
    torch.autograd.backward(loss)


def test_a_forward_pass_without_backward_holds_nothing(pieces: list[weakref.ref[Any]]) -> None:
    blocks, hidden = network()
    offload_activations(blocks, smallest=1)
    with torch.no_grad():
        through(blocks, hidden)
    assert not pieces
    through(blocks, hidden)
    gc.collect()
    assert pieces and not any(piece() is not None for piece in pieces)
