"""Speed and memory on one GPU: an 8B pretrained, a 70B fine-tuned in 4 bits, a 1B beside transformers' Trainer, each switch.

    python benchmarks/gpu.py --section qlora [--out FILE]      one section, on a box with a GPU
    python benchmarks/gpu.py [--out FILE]                      all of them, each in a process of its own
    python benchmarks/gpu.py --dry-run [--section NAME]        at toy sizes on the CPU

FILE is written anew with every row, and what other sections left in it stays: sections that are run one after the other land in
one file, and a process that is killed leaves the rows that it had. Without --out it is ``benchmarks/gpu_<card>_<date>.md``.
Every row goes to stderr too, as it comes, with the traceback of a row that failed.

Needs torch, transformers, accelerate and pydantic, for ``qlora`` peft and bitsandbytes too, and this repository, which need not
be installed. All weights are random: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "gpu"), str(HERE.parent / "src")]

from outgrow.processes import GPU_ENVIRONMENT  # noqa: E402  (once it is on the path)

ENVIRONMENT = {
    **GPU_ENVIRONMENT,
    "PYTORCH_CUDA_ALLOC_CONF": GPU_ENVIRONMENT["PYTORCH_ALLOC_CONF"],  # its name before torch 2.9
    "CUDA_VISIBLE_DEVICES": "0",  # of several cards the Trainer would take all
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}
"""What holds where the caller's environment says nothing else; read as torch and transformers are imported."""
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes", "liger-kernel", "flash-attn")
"""Those whose versions a result names."""
NEEDED = ("torch", "transformers", "accelerate", "safetensors", "pydantic", "yaml", "fsspec")
"""Modules that every section imports."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """``needs``: modules that it imports besides."""

    title: str
    needs: tuple[str, ...] = ()


SECTIONS: Mapping[str, Section] = {
    "pretraining": Section(title="Continued pretraining of an 8B (goal: 50% MFU on an H200)"),
    "qlora": Section(title="QLoRA of a 70B", needs=("peft", "bitsandbytes")),
    "trainer": Section(title="A 1B beside transformers' Trainer"),
    "switches": Section(title="Each switch by itself"),
    "syncs": Section(title="Steps that wait for the device"),
}


def versions() -> str:
    """Python and what counts among what is installed."""
    found = [f"Python {sys.version.split()[0]}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def lacking(section: str) -> list[str]:
    """Modules that the section cannot do without and that are not here."""
    return [name for name in (*NEEDED, *SECTIONS[section].needs) if find_spec(name) is None]


def run(name: str, dry: bool, out: Path | None) -> bool:
    """Measure a section in this process, and write it to ``out``; whether it came to its end."""
    if missing := lacking(name):
        say(f"{name}: not measured, as not installed here: {', '.join(missing)}")
        return False
    import torch

    if not dry and not torch.cuda.is_available():
        say("torch sees no GPU here; --dry-run goes through every section at toy sizes on the CPU")
        return False
    try:
        from attempts import in_a_line
        from report import Report
        from sections import SECTIONS as measured
        from training import device_name

        from outgrow.processes import end_rank
    except ModuleNotFoundError as error:
        if error.name is None:
            raise
        say(f"{name}: not measured, as not installed here: {error.name}")
        return False
    device = torch.device("cpu") if dry else torch.device("cuda", 0)
    card = "a dry run on the CPU" if dry else device_name(device)
    if out is None and not dry:
        out = HERE / f"gpu_{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}_{date.today().isoformat()}.md"
    command = f"`python benchmarks/gpu.py --section {name}{' --dry-run' if dry else ''}`"
    report = Report(out, SECTIONS[name].title, f"{command}; {card}; {versions()}; {date.today().isoformat()}.")
    fault = ""
    try:
        for line in measured[name](device, dry):
            report.add(line)
    except Exception as error:  # of a row it would be the row's text: this is what no row can outlive
        traceback.print_exc()
        fault = in_a_line(error)
    report.end(fault)
    if fault and not dry:
        end_rank(1)  # to take down what CUDA left in an unknown state could hang
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return not fault


def in_its_own_process(name: str, out: Path | None) -> bool:
    """Whether the section came to its end; one that does not leaves the next a whole device all the same."""
    command = [sys.executable, __file__, "--section", name, *(["--out", str(out)] if out else [])]
    status = subprocess.run(command, check=False).returncode
    if status:
        say(f"{name}: exit status {status}")
    return status == 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    """The exit status: 0 where every section came to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--section", choices=tuple(SECTIONS), help="this one alone")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU, all in this process")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the result goes; a dry run without it writes no file")
    given = parser.parse_args()
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    names = [given.section] if given.section else list(SECTIONS)
    if given.dry_run:
        if find_spec("torch"):
            import torch

            torch.set_num_threads(1)  # at toy sizes a second one only waits
        ended = [run(name, True, given.out) for name in names]
    elif given.section:
        ended = [run(given.section, False, given.out)]
    else:
        ended = [in_its_own_process(name, given.out) for name in names]
    return 0 if all(ended) else 1


if __name__ == "__main__":
    sys.exit(main())
