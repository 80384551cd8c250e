"""The loss of packed rows against a loop over targets."""

from __future__ import annotations

import math

import pytest
import torch

from outgrow.contracts import IGNORE_INDEX
from outgrow.trainers.objective import weighted_nll


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_sum_over_targets_one_by_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(2, 5, 11, generator=generator)).to(dtype)
    targets = torch.randint(11, (2, 5), generator=generator)
    targets[0, 3] = targets[1, 0] = IGNORE_INDEX
    weights = torch.rand(2, 5, generator=generator)
    expected = 0.0
    for i in range(2):
        for j in range(5):
            if targets[i, j] != IGNORE_INDEX:
                scores = logits[i, j].double().tolist()
                nll = math.log(sum(math.exp(score) for score in scores)) - scores[int(targets[i, j])]
                expected += float(weights[i, j]) * nll
    found = weighted_nll(logits, targets, weights)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.item() == pytest.approx(expected, rel=1e-6 if dtype != torch.float64 else 1e-12)


def test_a_row_without_targets_is_zero_with_a_zero_gradient() -> None:
    logits = torch.randn(1, 4, 7, requires_grad=True)
    loss = weighted_nll(logits, torch.full((1, 4), IGNORE_INDEX), torch.zeros(1, 4))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()
