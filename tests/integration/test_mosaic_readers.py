"""MosaicML's own datasets read a token store that was written in parts: every document, from a folder and as a remote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from token_stores import documents, write_store

_SCRIPT = """
import json, sys
from outgrow.streaming import _mosaic  # makes their package importable
from streaming import LocalDataset, StreamingDataset

folder, copy = sys.argv[1:]
remote = StreamingDataset(local=copy, remote=folder, batch_size=1, validate_hash="sha256", shuffle=False)
found = {"remote": [remote[n] for n in range(remote.num_samples)]}
if "zstd" not in copy:  # LocalDataset reads no compressed shard
    local = LocalDataset(folder)
    found["local"] = [local[n] for n in range(len(local))]
found = {kind: [[s["source"], s["tokens"].tolist(), s["meta"]] for s in samples] for kind, samples in found.items()}
print(json.dumps(found))
"""


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_document_is_read(tmp_path: Path, compression: str) -> None:
    given = documents(1, 130)
    write_store(tmp_path / "s", {"books": (given, [])}, compression=compression, part_documents=40)
    folder = tmp_path / "s/streams/books/train"
    assert len(list(folder.glob("documents/*"))) == 4
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(folder), str(tmp_path / compression)],
        env=os.environ | alone, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = [[f"books#{n}", tokens.tolist(), json.dumps({"number": n})] for n, (tokens, _) in enumerate(given)]
    assert found["remote"] == expected
    assert found.get("local", expected) == expected
