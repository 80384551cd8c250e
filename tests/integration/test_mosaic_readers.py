"""MosaicML's own datasets read a token store that was written in parts: every document, from a folder and as a remote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from token_stores import documents, write_store

_SCRIPT = """
import json, sys
from outgrow.streaming import _mosaic  # makes their package importable
from streaming import LocalDataset, StreamingDataset

found = {}
for compression in ("none", "zstd"):
    folder, copy = f"{sys.argv[1]}/{compression}/streams/books/train", f"{sys.argv[1]}/copy-{compression}"
    remote = StreamingDataset(local=copy, remote=folder, batch_size=1, validate_hash="sha256", shuffle=False)
    found[f"remote {compression}"] = [remote[n] for n in range(remote.num_samples)]
local = LocalDataset(f"{sys.argv[1]}/none/streams/books/train")  # which reads no compressed shard
found["local"] = [local[n] for n in range(len(local))]
print(json.dumps({kind: [[s["source"], s["tokens"].tolist(), s["meta"]] for s in own] for kind, own in found.items()}))
"""


def test_every_document_is_read(tmp_path: Path) -> None:
    given = documents(1, 130)
    for compression in ("none", "zstd"):
        write_store(tmp_path / compression, {"books": (given, [])}, compression=compression, part_documents=40)
    assert len(list((tmp_path / "zstd").glob("streams/books/train/documents/*"))) == 4
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)], env=os.environ | alone, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = [[f"books#{n}", tokens.tolist(), json.dumps({"number": n})] for n, (tokens, _) in enumerate(given)]
    assert {kind: own == expected for kind, own in found.items()} == {
        "remote none": True, "remote zstd": True, "local": True
    }  # fmt: skip
