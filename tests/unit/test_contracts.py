"""Every record goes through JSON and back unchanged, and contracts imports nothing heavy and nothing of ours."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import typing
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outgrow import contracts
from outgrow.contracts import Layout, Record, StepRecord

RECORDS = [
    kind for kind in vars(contracts).values() if isinstance(kind, type) and issubclass(kind, Record) and kind is not Record
]


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type; built by hand, so that a field of a new kind fails here and not in a worker."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([values(arg) for arg in args])
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple:
        assert args[1:] == (Ellipsis,)
        return st.lists(values(args[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(max_size=4), values(args[1]), max_size=2)
    if isinstance(hint, type) and issubclass(hint, Record):
        return records(hint)
    floats = st.floats(allow_nan=False, allow_infinity=False)
    return {
        str: st.text(max_size=8),
        int: st.integers(),
        float: floats,
        bool: st.booleans(),
        type(None): st.none(),
        Any: st.none() | st.text(max_size=4) | st.integers() | st.lists(floats, max_size=2),
    }[hint]


def records(kind: type[Record]) -> st.SearchStrategy[Record]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in fields(kind)})


@pytest.mark.parametrize("kind", RECORDS, ids=lambda kind: kind.__name__)
def test_a_record_goes_through_json_and_back(kind: type[Record]) -> None:
    @given(records(kind))
    @settings(max_examples=25, deadline=None)
    def there_and_back(record: Record) -> None:
        assert kind.from_dict(json.loads(json.dumps(record.to_dict()))) == record

    there_and_back()


def test_unknown_and_missing_fields_are_refused() -> None:
    layout = Layout(engine="plain", world=1, replicate=1, shard=1, global_rows=4, micro_rows=2, accumulation=2)
    with pytest.raises(TypeError, match="Layout: unknown fields tensor"):
        Layout.from_dict(layout.to_dict() | {"tensor": 2})
    data = layout.to_dict()
    del data["world"]
    with pytest.raises(TypeError, match="world"):
        Layout.from_dict(data)


def test_defaults_fill_what_an_older_record_lacks() -> None:
    record = StepRecord.from_dict({"kind": "step", "attempt": "a", "time": 1.0, "step": 1, "steps": 2})
    assert (record.loss, record.detail) == (None, {})


def test_rows_of_a_rank_leave_out_nothing() -> None:
    layout = Layout(engine="fsdp2", world=3, replicate=1, shard=3, global_rows=8, micro_rows=2, accumulation=2)
    dealt = [layout.rank_rows(tuple(range(8)), rank) for rank in range(3)]
    assert dealt == [((0, 3), (6,)), ((1, 4), (7,)), ((2, 5), ())]


def test_contracts_import_nothing_heavy() -> None:
    heavy = "{'torch', 'numpy', 'ray', 'pydantic', 'outgrow.errors'}"
    code = f"import sys, outgrow.contracts; sys.exit(str({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip() == "set()"
