"""Memory of ``outgrow data build`` on 2 GB of text: the greatest PSS of the whole tree of processes.

    python benchmarks/build_memory.py --mbytes 2000

A tokenizer is trained on the streams; they are plain and zstd-compressed JSON lines, text files, and one file of 200 MB. PSS
counts a page that several processes share once; the command ``outgrow data build`` runs as a process that is watched from here.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml
from corpus import library_texts, recipe_of, site_of, write_jsonl


def write_sources(root: Path, num_bytes: int) -> dict[str, Path]:
    """The folders of four streams, ``num_bytes`` in all."""
    folders = {name: root / name for name in ("lines", "packed", "files", "long")}
    for folder in folders.values():
        folder.mkdir()
    long_bytes = min(200_000_000, num_bytes // 10)
    with open(folders["long"] / "long.txt", "w", encoding="utf-8") as file:
        for text in library_texts(long_bytes):
            file.write(text)
    for number, text in enumerate(library_texts(num_bytes // 5)):
        (folders["files"] / f"{number:06}.txt").write_text(text, encoding="utf-8")
    rest = num_bytes - long_bytes - num_bytes // 5
    write_jsonl(folders["packed"] / "packed.jsonl.zst", rest // 3)
    write_jsonl(folders["lines"] / "lines.jsonl", rest - rest // 3)
    return folders


def pss_bytes(process: psutil.Process) -> tuple[int, int]:
    """PSS of a process and all its children, and how many there are; those that end meanwhile count nothing."""
    total = count = 0
    for member in [process, *process.children(recursive=True)]:
        try:
            total += member.memory_full_info().pss
            count += 1
        except psutil.NoSuchProcess:
            continue
    return total, count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mbytes", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        sources = write_sources(root, options.mbytes * 1_000_000)
        kinds = {"lines": "jsonl", "packed": "jsonl", "files": "text", "long": "text"}
        streams = [{"name": name, "source": {"kind": kinds[name], "path": name}} for name in sources]
        recipe = recipe_of(streams, {"kind": "train", "vocab_size": 16_384})
        (root / "recipe.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
        (root / "site.yaml").write_text(yaml.safe_dump(site_of(root, sources, options.processes).to_dict()))
        command = [
            sys.executable,
            "-m",
            "outgrow",
            "data",
            "build",
            str(root / "recipe.yaml"),
            "--site",
            str(root / "site.yaml"),
        ]
        start = time.monotonic()
        process = subprocess.Popen(command)
        watched, peak, largest = psutil.Process(process.pid), 0, 0
        while process.poll() is None:
            pss, count = pss_bytes(watched)
            peak, largest = max(peak, pss), max(largest, count)
            time.sleep(0.2)
        stored = sum(path.stat().st_size for path in (root / "storage").rglob("*") if path.is_file())
        print(f"{options.mbytes} MB of text, {largest} processes in the tree: peak PSS {peak / 1e6:,.0f} MB; exit code "
              f"{process.returncode}, {time.monotonic() - start:,.0f} s, dataset {stored / 1e6:,.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
