"""Time of ``outgrow --help``, and from ``outgrow train`` to its first step on a running Ray head with a built dataset.

    python benchmarks/startup.py --rounds 5

The head, the recipe and the text are those of the integration tests: a tiny model on two ranks, so that what is timed is
everything but training.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny_runs import head, tiny_place


def help_seconds() -> float:
    started = time.perf_counter()
    subprocess.run([Path(sys.executable).with_name("outgrow"), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def first_step_seconds(rounds: int) -> list[float]:
    found = []
    with tempfile.TemporaryDirectory() as folder, tiny_place(Path(folder)) as place:
        place.run("data", "build", "recipe.yaml")
        with head(place):
            for number in range(rounds + 1):
                started = time.perf_counter()
                command = place.start("train", "recipe.yaml", "duration.steps=2", f"run.name=round{number}")
                place.wait_for_step(1, command)
                found.append(time.perf_counter() - started)
                command.wait(120)
    return found[1:]


def show(name: str, seconds: list[float]) -> None:
    print(f"{name}: median {statistics.median(seconds):.2f} s ({min(seconds):.2f}-{max(seconds):.2f}), {len(seconds)} rounds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    show("outgrow --help", [help_seconds() for _ in range(2 * rounds + 1)][1:])
    show("outgrow train to its first step", first_step_seconds(rounds))


if __name__ == "__main__":
    main()
