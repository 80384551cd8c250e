"""The arithmetic of layouts and steps, against slow twins that deal out rows one by one."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from datasets_of_cards import card, index_card
from hypothesis import given, settings
from hypothesis import strategies as st

from outgrow.contracts import Layout
from outgrow.errors import PlanError
from outgrow.recipes.layout import positions, resolve, total_steps
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe

AUTO = {"kind": "auto"}


def recipe(rows: int = 8, micro_rows: int | str = "auto", parallel: Any = AUTO, **duration: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "schema": 1,
            "run": {"name": "tiny", "seed": 1},
            "model": {"kind": "architecture", "family": "llama"},
            "data": {
                "sequence_length": 16,
                "tokenizer": {"kind": "train", "vocab_size": 300},
                "streams": [{"name": "a", "source": {"kind": "text", "path": "a"}}],
            },
            "batch": {"rows": rows, "micro_rows": micro_rows},
            "duration": duration or {"steps": 5},
            "optimizer": {"kind": "adamw", "learning_rate": 0.1},
            "parallel": parallel,
        }
    )


def mix(asked: Recipe, rows: int) -> Mix:
    """The mix over a dataset of one stream."""
    return Mix.of(asked, card(index_card(16, {"a": (rows, 16 * rows)})))


def deal_one_by_one(row_ids: list[int], layout: Layout) -> list[list[list[int]]]:
    """Slow twin of ``rank_rows``: rows by rank and micro-batch, each row handed to the next rank in turn."""
    ranks: list[list[list[int]]] = [[[]] for _ in range(layout.world)]
    for position, row in enumerate(row_ids):
        mine = ranks[position % layout.world]
        if len(mine[-1]) == layout.micro_rows:
            mine.append([])
        mine[-1].append(row)
    for mine in ranks:
        mine += [[] for _ in range(layout.accumulation - len(mine))]
    return ranks


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40) | st.just("auto"), st.integers(0, 40))
@settings(deadline=None)
def test_every_row_of_a_step_goes_to_one_rank_once(rows: int, world: int, micro_rows: int | str, given_rows: int) -> None:
    if world > rows or (isinstance(micro_rows, int) and micro_rows > rows):
        return
    layout = resolve(recipe(rows, micro_rows), world, world)
    row_ids = list(range(100, 100 + min(given_rows, rows)))
    dealt = [[list(part) for part in layout.rank_rows(tuple(row_ids), rank)] for rank in range(world)]
    assert dealt == deal_one_by_one(row_ids, layout)
    assert sorted(row for mine in dealt for part in mine for row in part) == row_ids
    assert all(len(mine) == layout.accumulation for mine in dealt)
    if len(row_ids) == rows:
        assert max(len(part) for mine in dealt for part in mine) == layout.micro_rows
        # One micro-batch less would not hold the rows of the fullest rank.
        assert (layout.accumulation - 1) * layout.micro_rows < max(sum(map(len, mine)) for mine in dealt)


@pytest.mark.parametrize(
    ("parallel", "world", "local_world", "expected"),
    [
        (AUTO, 1, 1, ("plain", 1, 1)),
        (AUTO, 4, 2, ("fsdp2", 1, 4)),
        ({"kind": "fsdp2"}, 1, 1, ("fsdp2", 1, 1)),
        ({"kind": "fsdp2"}, 6, 2, ("fsdp2", 1, 6)),
        ({"kind": "fsdp2", "shard": "node"}, 4, 2, ("fsdp2", 2, 2)),
        ({"kind": "fsdp2", "shard": "node"}, 4, 4, ("fsdp2", 1, 4)),
        ({"kind": "fsdp2", "shard": 2}, 6, 3, ("fsdp2", 3, 2)),
        ({"kind": "fsdp2", "shard": 1}, 6, 3, ("fsdp2", 6, 1)),
    ],
)
def test_engine_and_mesh(parallel: Any, world: int, local_world: int, expected: tuple[str, int, int]) -> None:
    layout = resolve(recipe(8, parallel=parallel), world, local_world)
    assert (layout.engine, layout.replicate, layout.shard) == expected
    assert layout.world == layout.replicate * layout.shard


def test_more_ranks_than_rows_is_refused_with_both_ways_out() -> None:
    with pytest.raises(PlanError) as caught:
        resolve(recipe(3), 4, 4)
    assert str(caught.value) == (
        "batch.rows is 3, too few for 4 ranks; allowed: at most one rank a row\n"
        "  run with at most 3 workers, or raise batch.rows to 4"
    )


@pytest.mark.parametrize(
    ("shard", "local_world", "given"), [(4, 3, "4"), ("node", 4, "node (4 ranks on this one)"), (7, 3, "7")]
)
def test_a_shard_that_does_not_divide_the_ranks_is_refused(shard: int | str, local_world: int, given: str) -> None:
    with pytest.raises(PlanError) as caught:
        resolve(recipe(8, parallel={"kind": "fsdp2", "shard": shard}), 6, local_world)
    assert caught.value.message == f"parallel.shard is {given}, which does not divide 6 ranks; allowed: 1, 2, 3, 6"


@given(st.integers(1, 500), st.integers(1, 50))
@settings(deadline=None)
def test_an_epoch_takes_each_row_once(dataset_rows: int, rows: int) -> None:
    steps = 0
    left = dataset_rows
    while left > 0:
        left -= min(rows, left)
        steps += 1
    assert mix(recipe(rows), dataset_rows).steps_per_epoch == steps


@pytest.mark.parametrize(
    ("duration", "rows", "expected"),
    [
        ({"steps": 7}, 1000, 7),
        ({"tokens": 1}, 1000, 1),
        ({"tokens": 8 * 16 * 3}, 1000, 3),
        ({"tokens": 8 * 16 * 3 + 1}, 1000, 4),
        ({"epochs": 1}, 17, 3),
        ({"epochs": 2}, 16, 4),
        ({"epochs": 0.1}, 240, 3),
        ({"epochs": 1.5}, 17, 5),
    ],
)
def test_duration_in_steps(duration: dict[str, Any], rows: int, expected: int) -> None:
    asked = recipe(8, **duration)
    assert total_steps(asked, mix(asked, rows)) == expected
    if "epochs" not in duration:
        assert total_steps(asked) == expected, "known before the data are built"


@given(st.integers(1, 10**6), st.integers(1, 999))
@settings(deadline=None)
def test_epochs_round_up_as_written(dataset_rows: int, hundredths: int) -> None:
    asked = recipe(epochs=hundredths / 100)
    own = mix(asked, dataset_rows)
    steps = Fraction(hundredths, 100) * own.steps_per_epoch
    assert total_steps(asked, own) == -(-steps.numerator // steps.denominator)


def test_a_dataset_without_rows_is_refused() -> None:
    with pytest.raises(PlanError, match="no row to train on"):
        mix(recipe(), 0)


STAGES = [(3 * 8 * 16 + 1, None), (2 * 8 * 32, 32), (1, 8), (None, 64)]
"""Tokens and length of rows; with 8 rows a step: 4 steps of 16, 2 of 32, 1 of 8, then steps of 64."""


def staged(**duration: int) -> Recipe:
    stages = [{"tokens": tokens, "shares": {"a": 1}, "sequence_length": length} for tokens, length in STAGES]
    data = recipe(8, **duration).to_dict()
    data["data"]["stages"] = stages
    return Recipe.model_validate(data)


@given(st.integers(1, 4000))
@settings(deadline=None)
def test_tokens_of_a_run_in_stages_are_positions_of_its_rows(tokens: int) -> None:
    lengths = [16] * 4 + [32] * 2 + [8] + [64] * 100
    steps, seen = 0, 0
    while seen < tokens:
        seen += 8 * lengths[steps]
        steps += 1
    asked = staged(tokens=tokens)
    assert total_steps(asked) == steps
    assert positions(asked, steps) == seen
    assert total_steps(staged(steps=steps)) == steps
