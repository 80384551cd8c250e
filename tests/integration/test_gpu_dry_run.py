"""``benchmarks/gpu.py --dry-run``: every section runs at toy sizes on a CPU, on what a bare box with a GPU has installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = """
import runpy, sys
sys.argv = ["gpu.py", "--dry-run", *sys.argv[1:]]
sys.modules.update(dict.fromkeys(("ray", "streaming"), None))  # importing either is an error
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""


def test_every_section_runs_without_ray_and_without_the_loader(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    made = subprocess.run(
        [sys.executable, "-c", RUN, "--out", str(out)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert made.returncode == 0, made.stderr[-2000:]
    text = out.read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(titles) == len(set(titles)) >= 4
    assert "out of memory" not in text
    for name in ("plain, AdamW", "activation offload, 8-bit AdamW", "FSDP2 on one rank", "outgrow again"):
        assert f"| {name} |" in text
    assert "outgrow / Trainer, each at its best" in text
