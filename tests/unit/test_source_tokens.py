"""Token ids that MosaicML's writer left in MDS shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from opened_sources import dropped, everything, opened

from outgrow.errors import DataError
from outgrow.streaming.sources import Document


def write_mds(folder: Path, encoding: str, samples: list[Any], column: str = "tokens") -> None:
    from outgrow.streaming import _mosaic

    with _mosaic.MDSWriter(columns={column: encoding}, out=str(folder), hashes=["sha1"], size_limit=2000) as writer:
        for sample in samples:
            writer.write({column: sample})


@pytest.mark.parametrize("encoding", ["ndarray:uint16", "ndarray:int32", "ndarray", "bytes"])
def test_what_mdswriter_wrote_opens_here(tmp_path: Path, encoding: str) -> None:
    """llm-foundry writes ``ndarray`` tokens, and before 0.5 the bytes of int64."""
    draw = np.random.default_rng(0)
    tokens = [draw.integers(0, 30_000, length, np.int64) for length in draw.integers(1, 200, 40)]
    dtype = {"ndarray:uint16": np.uint16, "ndarray:int32": np.int32}.get(encoding, np.int64)
    write_mds(tmp_path / "mds", encoding, [t.tobytes() if encoding == "bytes" else t.astype(dtype) for t in tokens])
    source = opened(tmp_path, tmp_path / "mds", kind="mds")
    found = everything(source)
    assert len(found) == 40
    for number, (document, expected) in enumerate(zip(found, tokens, strict=True)):
        assert isinstance(document, Document) and isinstance(document.content, np.ndarray)
        assert document.content.dtype == np.int64
        assert document.source == f"mds#{number}"
        np.testing.assert_array_equal(document.content, expected)
    assert {item.name for item in source.inputs} >= {"index.json", "shard.00000.mds"}


def test_a_sample_without_tokens_is_counted(tmp_path: Path) -> None:
    write_mds(tmp_path / "mds", "bytes", [b"", np.arange(3).tobytes()])
    source = opened(tmp_path, tmp_path / "mds", kind="mds")
    assert dropped(source) == [("mds#0", "empty")]
    assert len(everything(source)) == 2


def test_bytes_that_are_no_token_ids_are_refused(tmp_path: Path) -> None:
    write_mds(tmp_path / "mds", "bytes", [b"abc"])
    with pytest.raises(DataError, match="mds#0: token ids are a row of integers or bytes of int64, not a value of type bytes"):
        everything(opened(tmp_path, tmp_path / "mds", kind="mds"))


def test_an_mds_folder_without_such_a_column_or_with_a_hostile_index_is_refused(tmp_path: Path) -> None:
    write_mds(tmp_path / "mds", "str", ["a", "b"], column="text")
    with pytest.raises(DataError, match=r"no column 'tokens' of token ids; columns: text \(str\)"):
        opened(tmp_path, tmp_path / "mds", kind="mds")
    index = tmp_path / "mds" / "index.json"
    value = json.loads(index.read_text())
    for change in ({"column_encodings": ["pkl"]}, {"raw_data": {**value["shards"][0]["raw_data"], "basename": "../x.mds"}}):
        index.write_text(json.dumps({**value, "shards": [{**value["shards"][0], **change}]}))
        with pytest.raises(DataError):
            opened(tmp_path, tmp_path / "mds", kind="mds")
