"""Headers of safetensors files by strangers: what is true of its file is read, all else is refused with the tensor's name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from outgrow.errors import ModelError
from outgrow.trainers.models.safetensors_file import SafetensorsFile
from outgrow.trainers.regions import Region
from outgrow.trainers.safetensors_header import DTYPES, NotSafetensors, header_bytes, parse

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(start: int, stop: int, **other: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop], **other}


def file_of(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


@pytest.mark.parametrize("dtype", [dtype for name, dtype in DTYPES.items() if name != "C64"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0,), (2, 0, 3)])
def test_what_the_package_writes_is_read_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    count = torch.Size(shape).numel()
    values = torch.arange(count * dtype.itemsize, dtype=torch.uint8).remainder(2).view(dtype).reshape(shape)
    save_file({"a": values, "b": torch.ones(3)}, tmp_path / "f.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "f.safetensors")
    assert file.shape("a") == shape and file.dtype("a") == dtype
    read = file.read("a", Region.whole(shape))
    assert torch.equal(
        read.view(torch.uint8) if shape else read.reshape(1).view(torch.uint8),
        values.view(torch.uint8) if shape else values.reshape(1).view(torch.uint8),
    )


def test_a_header_that_is_not_padded_is_read_too(tmp_path: Path) -> None:
    """Numbers then begin anywhere in the file."""
    for padding in range(8):
        header = json.dumps({"a": F32}).encode() + b" " * padding
        path = file_of(tmp_path / f"{padding}", header, struct.pack("<2f", 1.5, -2.0))
        assert SafetensorsFile(path).read("a", Region((1,), (1,))).tolist() == [-2.0]


def test_a_box_outside_of_a_tensor_is_an_error(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(4, 4)}, tmp_path / "f")
    file = SafetensorsFile(tmp_path / "f")
    for region in (Region((0, 0), (5, 4)), Region((3, 1), (1, 4)), Region((-1, 0), (1, 4))):
        with pytest.raises(ModelError, match="a has shape"):
            file.read("a", region)


@pytest.mark.parametrize(
    ("length", "file_bytes", "message"),
    [
        (3, 10, "its header has 3 bytes, and 2 are there"),
        (2**63, 1000, "its header has 9,223,372,036,854,775,808 bytes, and 992 are there"),
        (2**64 - 1, 1000, "and 992 are there"),
        (5_000_000_000, 6_000_000_000, "its header has 5,000,000,000 bytes; allowed: 100,000,000"),
    ],
)
def test_a_length_that_lies_is_refused(length: int, file_bytes: int, message: str) -> None:
    with pytest.raises(NotSafetensors, match=message):
        header_bytes(struct.pack("<Q", length), file_bytes)


def test_a_header_of_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    """The file is a hole of 5 GB; to read it would take as much memory."""
    path = file_of(tmp_path / "f.safetensors", b"", length=5_000_000_000)
    with open(path, "r+b") as file:
        file.truncate(5_000_000_100)
    with pytest.raises(ModelError, match=r"f\.safetensors: not a whole safetensors file: its header has 5,000,000,000 bytes"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "data_bytes", "message"),
    [
        (b"", 0, "not JSON"),
        (b"\xff\xfe", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
        (b'{"a": 1' + b"0" * 5000 + b"}", 0, "not JSON"),
        (b"[]", 0, "not a JSON object"),
        (b"null", 0, "not a JSON object"),
        ({"a": 3}, 0, "'a': dtype, shape and data_offsets are asked for"),
        ({"a": {**F32, "more": 1}}, 8, "'a': dtype, shape and data_offsets are asked for"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a': dtype, shape and data_offsets are asked for"),
        ({"a": {**F32, "dtype": "F31"}}, 8, "'a': unknown dtype 'F31'; known: F64, F32"),
        ({"a": {**F32, "dtype": 7}}, 8, "'a': unknown dtype 7"),
        ({"a": {**F32, "dtype": ["F32"]}}, 8, "'a': unknown dtype"),
        ({"a": {**F32, "shape": [-2]}}, 8, "'a': its shape and its two offsets must be whole numbers from 0"),
        ({"a": {**F32, "shape": [2.0]}}, 8, "whole numbers from 0"),
        ({"a": {**F32, "shape": [True, 2]}}, 8, "whole numbers from 0"),
        ({"a": {**F32, "shape": 2}}, 8, "whole numbers from 0"),
        ({"a": {**F32, "data_offsets": [0, 4, 8]}}, 8, "whole numbers from 0"),
        ({"a": {**F32, "data_offsets": [8, 0]}}, 8, r"'a': F32 \[2\] takes 8 bytes, and bytes 8 to 0 hold it"),
        ({"a": {**F32, "data_offsets": [0, 9]}}, 9, "takes 8 bytes, and bytes 0 to 9 hold it"),
        ({"a": {**F32, "shape": [2**40, 2**40]}}, 8, "takes 4,835,703,278,458,516,698,824,704 bytes"),
        ({"a": {**F32, "shape": [2**62, 4, 0, 2]}}, 8, "takes 0 bytes, and bytes 0 to 8 hold it"),
        ({"a": F32}, 7, "'a' ends at byte 8 of 7"),
        ({"a": entry(0, 4), "b": entry(3, 7)}, 7, "'b' and 'a' overlap"),
        ({"b": entry(0, 4), "a": entry(0, 4)}, 4, "overlap"),
        ({"a": entry(1, 4)}, 4, "bytes 0 to 1, before 'a', belong to no tensor"),
        ({"b": entry(6, 8), "a": entry(0, 4)}, 8, "bytes 4 to 6, before 'b', belong to no tensor"),
        ({"a": entry(0, 4)}, 6, "the last 2 bytes belong to no tensor"),
        ({}, 6, "the last 6 bytes belong to no tensor"),
        (
            b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            1,
            "names 'a' twice",
        ),
        (b'{"a": {"dtype":"U8","shape":[1],"shape":[2],"data_offsets":[0,1]}}', 1, "names 'shape' twice"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused_by_the_tensors_name(header: Any, data_bytes: int, message: str) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(NotSafetensors, match=message):
        parse(text, data_bytes)


def test_tensors_may_be_named_in_any_order() -> None:
    entries = parse(json.dumps({"z": entry(4, 6), "e": entry(4, 4), "a": entry(0, 4)}).encode(), 6)
    assert entries["z"].start == 4


names = st.sampled_from(["a", "b", "c"])
numbers = st.integers(-1, 12)
entries_of_all_kinds = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F16", "F32", "X"]),
        "shape": st.lists(numbers, max_size=2),
        "data_offsets": st.lists(numbers, max_size=3),
    }
)


@given(table=st.dictionaries(names, entries_of_all_kinds, max_size=3), data_bytes=st.integers(0, 16))
def test_what_is_taken_lies_within_the_file_and_the_package_takes_it_too(
    table: dict[str, Any], data_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = json.dumps(table).encode()
    try:
        taken = parse(text, data_bytes)
    except NotSafetensors:
        return
    covered = sorted((one.start, one.stop) for one in taken.values())
    assert sum(stop - start for start, stop in covered) == data_bytes
    path = file_of(tmp_path_factory.mktemp("f") / "f", text, bytes(data_bytes))
    try:
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == set(taken)
    except SafetensorError as error:  # the package refuses more where it wants padding or order
        pytest.fail(f"{table}: {error}")
