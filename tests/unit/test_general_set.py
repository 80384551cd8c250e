"""A stream for validation alone: held out whole, in no row of training, and what a recipe may say of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from text_recipes import make_recipe, make_site, text, text_stream, write_texts
from token_stores import Dataset, documents, layout, make_dataset

from outgrow.errors import DataError, PlanError
from outgrow.recipes.measured import require_measured
from outgrow.recipes.mix import Mix
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.data import Data
from outgrow.streaming.build import build, find
from outgrow.streaming.catalog import section_key
from outgrow.streaming.inspect import first_rows
from outgrow.streaming.loader import build_loader, build_validation
from outgrow.streaming.report import make_report
from outgrow.streaming.store import store_choices

GENERAL = {"use": "validation"}
A, B, HELD_OUT = documents(1, 61), documents(3, 23), documents(9, 12)


def dataset(root: Path, *, copies: int = 0, with_general: bool = True, **options: Any) -> Dataset:
    """Streams ``a`` and ``z``, and a general one between them; ``copies`` of its documents are in ``a`` too."""
    streams: dict[str, Any] = {"a": (A + HELD_OUT[:copies], documents(2, 7))}
    streams |= {"general": ([], HELD_OUT)} if with_general else {}
    own = {"general": GENERAL} if with_general else {}
    return make_dataset(root, streams | {"z": (B, documents(4, 5))}, options=own | options)


def rows_read(made: Dataset, **changes: Any) -> list[tuple[int, ...]]:
    return [step.row_ids for step in build_loader(made.job(**changes), layout(1), 0, start_step=0, stop_step=30)]


def test_training_reads_the_rows_that_it_would_read_without_it(tmp_path: Path) -> None:
    with_it, without = dataset(tmp_path / "with"), dataset(tmp_path / "without", with_general=False)
    assert rows_read(with_it) == rows_read(without)
    (general,) = [stream for stream in with_it.card.streams if stream.name == "general"]
    assert (general.documents, general.tokens, general.rows) == (0, 0, 0)
    assert general.validation_documents == len(HELD_OUT) and general.validation_rows > 0
    names = [name for name, _ in build_validation(with_it.job(), layout(1), 0)]
    assert list(dict.fromkeys(names)) == ["a", "general", "z"]


def test_shares_of_the_other_streams_are_shares_of_all(tmp_path: Path) -> None:
    shares = {"a": {"share": 0.75}, "z": {"share": 0.25}}
    made = dataset(tmp_path / "shares", **shares)
    assert Mix.of(made.recipe(), made.card).phases[0].takes[1] == 0
    assert rows_read(made) == rows_read(dataset(tmp_path / "without", with_general=False, **shares))


@pytest.mark.parametrize(("remove", "across"), [("none", "streams"), ("exact", "streams"), ("exact", "stream")])
def test_a_copy_of_one_of_its_documents_is_not_trained_on(tmp_path: Path, remove: str, across: str) -> None:
    made = make_dataset(
        tmp_path,
        {"a": (A + HELD_OUT[:3], documents(2, 7)), "general": ([], HELD_OUT)},
        options={"general": GENERAL},
        data={"duplicates": {"remove": remove, "across": across}},
    )
    a, general = made.card.streams
    assert a.dropped["like_validation"] == 3 and a.documents + a.dropped.get("duplicate", 0) == len(A)
    assert general.validation_documents == len(HELD_OUT)


def test_copies_of_what_is_not_held_out_are_not_compared_with_each_other(tmp_path: Path) -> None:
    copies = [A[0]] * 20
    made = make_dataset(
        tmp_path,
        {"a": (A + copies + HELD_OUT[:1] * 3, copies), "general": ([], HELD_OUT + HELD_OUT[:2] * 2)},
        options={"general": GENERAL},
    )
    a, general = made.card.streams
    assert a.dropped == {"like_validation": 3} and a.documents == len(A) + 20
    assert general.validation_documents == len(HELD_OUT) + 4 and not general.dropped


def test_without_one_nothing_is_compared_that_was_not_asked_for(tmp_path: Path) -> None:
    made = make_dataset(tmp_path, {"a": (A + A[:3], documents(2, 7)), "z": (B, A[:2])})
    assert not any(stream.dropped for stream in made.card.streams)


def test_a_dataset_is_built_with_it_and_found_and_shown(tmp_path: Path) -> None:
    prose, general = write_texts(tmp_path / "prose", 30), tmp_path / "general"
    general.mkdir()
    for number in range(6):
        (general / f"{number}.txt").write_text(text(500 + number, 40))
    shutil.copy(general / "0.txt", prose / "copy.txt")
    site = make_site(tmp_path / "site", prose=prose, general=general)
    recipe = make_recipe(text_stream(), text_stream("general") | GENERAL)
    built = build(recipe, site).card
    by_name = {stream.name: stream for stream in built.streams}
    assert (by_name["general"].documents, by_name["general"].validation_documents) == (0, 6)
    assert by_name["prose"].dropped == {"like_validation": 1}
    assert find(recipe, site) == built and not build(recipe, site).built
    assert {row.stream for row in first_rows(recipe, site, built, 20)} == {"prose"}
    assert "general" in make_report(site, built, recipe)

    without = build(make_recipe(text_stream(), validation_fraction=0.2), make_site(tmp_path / "other", prose=prose)).card
    assert without.tokenizer_fingerprint == built.tokenizer_fingerprint, "the tokenizer never saw the general set"
    with pytest.raises(DataError, match="stream 'empty' holds no document to validate on"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty/e.txt").touch()
        build(
            make_recipe(text_stream(), text_stream("empty") | GENERAL),
            make_site(tmp_path / "third", prose=prose, empty=tmp_path / "empty"),
        )


def test_datasets_without_one_keep_their_names() -> None:
    recipe = make_recipe(text_stream())
    assert "use" not in store_choices(recipe.data)["streams"][0]
    marked = make_recipe(text_stream(), text_stream("general") | GENERAL)
    assert store_choices(marked.data)["streams"][1]["use"] == "validation"
    assert section_key(make_recipe(text_stream(), text_stream("general"))) != section_key(marked)


def problems(changes: dict[str, Any]) -> str:
    base = make_recipe(text_stream(), text_stream("general") | GENERAL).to_dict()
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(base | changes)
    return str(caught.value)


STOP = {"kind": "stop", "rise": 0.5}
BACK = {"kind": "roll_back", "rise": 0.5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": {"best_by": "genral"}}, "there is no stream 'genral'; allowed: total, prose, general"),
        (
            {"validation": {"on_rise": STOP | {"metric": "x"}}},
            "validation.on_rise.metric: there is no stream 'x'; allowed: tot",
        ),
        ({"validation": {"every_steps": 0, "on_rise": STOP}}, "0 validates after the last step alone"),
        ({"validation": {"on_rise": BACK | {"metric": "general"}}}, "those by total are kept; set it to general"),
        ({"validation": {"on_rise": BACK}, "checkpoint": {"keep_best": 0}}, "and none is kept; set it to 1"),
        ({"validation": {"on_rise": BACK, "every_steps": 300}}, "300 is no multiple of checkpoint.every_steps (500)"),
        ({"validation": {"on_rise": STOP | {"rise": 0}}}, "greater than 0"),
    ],
)
def test_what_a_guard_cannot_go_by_is_refused(changes: dict[str, Any], message: str) -> None:
    assert message in problems(changes)


@pytest.mark.parametrize(
    ("streams", "changes", "message"),
    [
        ([GENERAL], {}, "streams[0].use: no stream is left to train on"),
        ([{}, GENERAL | {"share": 0.5}], {}, "a stream for validation is not trained on; remove it"),
        ([{}, GENERAL], {"stages": [{"shares": {"s0": 0.5, "s1": 0.5}}]}, "'s1' is for validation (use), not trained on"),
        ([{"share": 0.5}, GENERAL], {}, "streams[0].share: all streams have a share, and they add up to 0.5"),
    ],
)
def test_what_a_stream_for_validation_cannot_be_is_refused(
    streams: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    given = [text_stream(f"s{number}") | own for number, own in enumerate(streams)]
    section = {"sequence_length": 16, "tokenizer": {"kind": "train", "vocab_size": 300}, "streams": given, **changes}
    with pytest.raises(ValidationError, match=re.escape(message)):
        Data.model_validate(section)


def test_a_metric_needs_rows_that_are_held_out(tmp_path: Path) -> None:
    made = make_dataset(tmp_path, {"a": (A, []), "general": ([], HELD_OUT)}, options={"general": GENERAL})
    require_measured(made.recipe(), made.card)
    require_measured(made.recipe(checkpoint={"best_by": "general"}), made.card)
    with pytest.raises(PlanError, match=r"checkpoint\.best_by is a, of which no document is held out; measured: general"):
        require_measured(made.recipe(checkpoint={"best_by": "a"}), made.card)
    with pytest.raises(PlanError, match=r"validation\.on_rise\.metric is total, of which no document is held out"):
        require_measured(made.recipe(validation={"on_rise": STOP}), made.card)
