"""Speed and memory on one GPU: an 8B pretrained, a 70B fine-tuned in 4 bits, a 1B beside transformers' Trainer, each switch.

    python benchmarks/gpu.py [--section qlora ...] [--out FILE]       on a box with a GPU
    python benchmarks/gpu.py --dry-run                                every section at toy sizes on the CPU

Needs torch, transformers, peft, bitsandbytes, pydantic and this repository, which need not be installed. All weights are
random: nothing is downloaded. Each section is a process of its own, so that one that fails leaves the others their memory.
Without --out the result goes to ``benchmarks/gpu_<card>_<date>.md``.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "gpu"), str(HERE), str(HERE.parent / "src")]

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "flash-attn")


def versions() -> str:
    """Python and what counts among what is installed."""
    found = [f"Python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def one(name: str, dry: bool) -> str:
    """Markdown of a section, made in this process."""
    import torch
    from sections import SECTIONS

    title, section = SECTIONS[name]
    device = torch.device("cpu" if dry else "cuda")
    return f"## {title}\n\n{section(device, dry)}\n"


def in_its_own_process(name: str) -> str:
    """Markdown of a section, or how it ended."""
    environment = os.environ | {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # as in a run: deterministic kernels ask for it
        "TOKENIZERS_PARALLELISM": "false",
    }
    start = time.monotonic()
    made = subprocess.run(
        [sys.executable, __file__, "--alone", name], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    print(f"{name}: {time.monotonic() - start:.0f} s, exit status {made.returncode}", file=sys.stderr, flush=True)
    text = made.stdout[made.stdout.find("## ") :] if "## " in made.stdout else ""
    return text if made.returncode == 0 else f"## {name}\n\nended with status {made.returncode}\n{text}"


def head(card: str, command: str) -> str:
    today = date.today().isoformat()
    return f"# One GPU: speed and memory\n\n    {command}\n\n{card}; {versions()}; {today}. GB are 1e9 bytes.\n"


def main() -> None:
    from sections import SECTIONS, device_name

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=tuple(SECTIONS), nargs="+", default=list(SECTIONS), help="these alone")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, in this process")
    parser.add_argument("--out", type=Path, help="where the result goes")
    parser.add_argument("--alone", choices=tuple(SECTIONS), help="one section in this process (used by the script itself)")
    given = parser.parse_args()
    if given.alone:
        print(one(given.alone, dry=False))
        return
    import torch

    if given.dry_run:
        torch.set_num_threads(1)  # at toy sizes a second one only waits
        made = []
        for name in given.section:
            start = time.monotonic()
            made.append(one(name, dry=True))
            print(f"{name}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        card = "a dry run on the CPU"
    elif not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --dry-run goes through every section at toy sizes on the CPU")
    else:
        made = [in_its_own_process(name) for name in given.section]
        card = device_name(torch.device("cuda"))
    text = "\n".join([head(card, " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])), *made])
    print(text)
    if given.out or not given.dry_run:
        name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
        (given.out or HERE / f"gpu_{name}_{date.today().isoformat()}.md").write_text(text)


if __name__ == "__main__":
    main()
