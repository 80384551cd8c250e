"""``benchmarks/gpu.py --dry-run``: every section runs at toy sizes on a CPU, on what a bare box with a GPU has installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = """
import runpy, sys
missing, *given = sys.argv[1:]
sys.argv = ["gpu.py", "--dry-run", *given]
sys.modules.update(dict.fromkeys(missing.split(",")))  # importing one of these is an error
runpy.run_path("benchmarks/gpu.py", run_name="__main__")
"""
NOT_THERE = "ray,streaming,deepspeed,zstandard,bcrypt,plotly,py3langid,pypdfium2,docx,rensa,grafana_foundation_sdk,pynvml"


def dry_run(missing: str, *given: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, missing, *given],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_every_section_runs_without_ray_and_without_the_loader(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    made = dry_run(NOT_THERE, "--out", str(out))
    assert made.returncode == 0, made.stderr[-2000:]
    text = out.read_text()
    titles = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(titles) == len(set(titles)) >= 4
    assert not any(words in text for words in ("out of memory", "Error", "Not finished", "Ended early"))
    for name in ("plain, AdamW", "activation offload, 8-bit AdamW", "FSDP2 on one rank", "outgrow again"):
        assert f"| {name} |" in text
    assert "outgrow / Trainer, each at its best" in text


def test_bitsandbytes_is_missed_by_4_bits_alone(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    made = dry_run(f"{NOT_THERE},bitsandbytes", "--section", "syncs", "--out", str(out))
    assert made.returncode == 0, made.stderr[-2000:]
    assert "| QLoRA | bitsandbytes is not installed |" in out.read_text()
    assert "| LoRA | not asked: no GPU |" in out.read_text()
