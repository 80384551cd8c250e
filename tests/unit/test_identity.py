"""Every key of a recipe has one verdict, and the fingerprint follows what is learned and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from outgrow.recipes.identity import LEARNED, VERDICTS, Difference, classify, differences, fingerprint
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema_types import leaves

KEYS = sorted({leaf.key.replace("[]", "") for leaf in leaves(Recipe)})


def recipe(**changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "schema": 1,
        "run": {"name": "tiny", "seed": 1},
        "model": {"kind": "architecture", "family": "llama", "config": {"hidden_size": 64}},
        "data": {
            "sequence_length": 16,
            "tokenizer": {"kind": "train", "vocab_size": 300},
            "streams": [{"name": "a", "source": {"kind": "text", "path": "a"}}],
        },
        "batch": {"rows": 8},
        "duration": {"steps": 5},
        "optimizer": {"kind": "adamw", "learning_rate": 0.1},
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        section = data
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    return Recipe.model_validate(data)


@pytest.mark.parametrize("key", KEYS)
def test_every_key_of_the_schema_is_classified(key: str) -> None:
    """By one entry, or by one that is of a key below that of another."""
    entries = sorted((entry for entry in VERDICTS if f"{key}.".startswith(f"{entry}.")), key=len)
    assert len(entries) in (1, 2)
    classify(tuple(key.split(".")))


def test_every_entry_of_the_table_is_a_key_of_the_schema() -> None:
    assert [entry for entry in VERDICTS if not any(f"{key}.".startswith(f"{entry}.") for key in KEYS)] == []


def test_what_is_learned_is_refused_when_changed() -> None:
    assert {VERDICTS[key][0] if key in VERDICTS else None for key in LEARNED} == {"refuse"}


@pytest.mark.parametrize(
    "changes",
    [
        {"run__name": "other"},
        {"duration": {"tokens": 9}},
        {"optimizer__learning_rate": 0.2},
        {"optimizer__clip_norm": 0},
        {"schedule": {"kind": "linear"}},
        {"batch__micro_rows": 2},
        {"parallel": {"kind": "fsdp2"}},
        {"checkpoint__every_steps": 3},
        {"validation__max_rows": 3},
        {"logging__every_steps": 3},
        {"data__loader_workers": 3},
        {"activation_checkpointing": {"kind": "full"}},
        {"deterministic": False},
    ],
)
def test_the_fingerprint_stays(changes: dict[str, Any]) -> None:
    assert fingerprint(recipe(**changes), "store") == fingerprint(recipe(), "store")


@pytest.mark.parametrize(
    "changes",
    [
        {"run__seed": 2},
        {"model__family": "qwen3"},
        {"model__config": {"hidden_size": 65}},
        {"data__sequence_length": 32},
        {"data__window_shards": 4},
        {"data__tokenizer": {"kind": "train", "vocab_size": 301}},
        {"batch__rows": 9},
        {"precision": "fp32"},
        {"data__stages": [{"shares": {"a": 1.0}}]},
        {"data__streams": [{"name": "a", "source": {"kind": "text", "path": "a"}, "epochs": 2}]},
        {"data__streams": [{"name": "a", "source": {"kind": "text", "path": "a"}, "share": 1}]},
    ],
)
def test_the_fingerprint_changes(changes: dict[str, Any]) -> None:
    assert fingerprint(recipe(**changes), "store") != fingerprint(recipe(), "store")


def test_the_fingerprint_follows_the_content_of_the_data() -> None:
    assert fingerprint(recipe(), "store") != fingerprint(recipe(), "other store")


def test_the_fingerprint_does_not_ask_how_documents_became_these_rows() -> None:
    """Cleaning, choice and cuts that change no row of any index change nothing that is learned."""
    cleaned = {"name": "a", "source": {"kind": "text", "path": "b"}, "clean": [{"kind": "nfc"}], "filter": {"min_chars": 3}}
    changed = recipe(data__streams=[cleaned], data__duplicates={"remove": "near"})
    assert fingerprint(changed, "store") == fingerprint(recipe(), "store")


def test_stages_change_never_and_say_what_to_do_instead() -> None:
    old, new = recipe(), recipe(data__stages=[{"tokens": 9, "shares": {"a": 1.0}}, {"shares": {"a": 1.0}}])
    (found,) = differences(old.to_dict(), new.to_dict())
    assert (found.key, found.verdict) == ("data.stages", "refuse")
    assert str(found).endswith("(steps would hold other rows; to make the last stage longer, raise duration)")
    assert classify(("data", "stages", 0, "shares", "a"))[0] == "refuse"


def test_the_fingerprint_of_today_is_the_one_of_tomorrow() -> None:
    """It names run folders: raise ``identity.FORMAT`` when this must change."""
    assert fingerprint(recipe(), "store")[:16] == "518fe2b54e640ef0"


def test_differences_are_shown_key_by_key_with_their_verdict() -> None:
    old = recipe().to_dict()
    new = recipe(
        duration={"tokens": 9},
        optimizer__learning_rate=0.2,
        model__config={"hidden_size": 64, "num_hidden_layers": 2},
        data__streams=[{"name": "a", "source": {"kind": "text", "path": "b"}}],
    ).to_dict()
    found = differences(old, new)
    assert [(d.key, d.old, d.new, d.verdict) for d in found] == [
        ("model.config.num_hidden_layers", None, 2, "refuse"),
        ("data.streams[0].source.path", "a", "b", "refuse"),
        ("duration.steps", 5, None, "extend"),
        ("duration.tokens", None, 9, "extend"),
        ("optimizer.learning_rate", 0.1, 0.2, "accept"),
    ]
    assert isinstance(found[0], Difference)
    assert str(found[4]) == "optimizer.learning_rate: 0.1 -> 0.2 (the loss takes another course from here)"


def test_a_changed_kind_and_a_changed_list_are_shown() -> None:
    new = recipe(
        schedule={"kind": "constant"},
        data__streams=[{"name": name, "source": {"kind": "text", "path": name}} for name in "ab"],
    ).to_dict()
    assert [d.key for d in differences(recipe().to_dict(), new)] == ["data.streams", "schedule.kind", "schedule.final_fraction"]


def test_no_difference_between_equal_recipes() -> None:
    assert differences(recipe().to_dict(), recipe().to_dict()) == []


def test_a_key_of_a_later_version_counts_as_its_default_in_an_older_recipe() -> None:
    old, new = recipe().to_dict(), recipe().to_dict()
    del old["data"]["duplicates"], old["data"]["streams"][0]["clean"]
    assert differences(old, new) == []
    new["data"]["duplicates"]["remove"] = "exact"
    assert [difference.key for difference in differences(old, new)] == ["data.duplicates.remove"]
    old["batch"]["rows"] = 0
    assert "batch.rows" in [difference.key for difference in differences(old, new)], "no recipe of today: compared as it stands"
