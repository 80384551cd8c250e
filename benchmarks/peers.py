"""Tokens a second of outgrow beside a bare loop, transformers' Trainer, litgpt and TRL, each at its best, on this CPU.

    python benchmarks/peers.py [--set dense] [--rounds 14] [--threads 2] [--peers FOLDER]      prints tables in Markdown
    python benchmarks/peers.py --tune [--peers FOLDER]                                         what is best for each

Each contender trains in a process of its own with its own trainer and loader, stopped between steps; in every round each has
one optimizer step, in turns, so that a noisy machine slows all. ``peers/settings.yaml`` has the model and what was best for
each; FOLDER has litgpt and TRL, installed as ``peers/requirements.txt`` says; without it they are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent / "peers"
ELSEWHERE = ("litgpt", "trl")
"""Contenders that are not installed with outgrow."""
SIZES = (1, 2, 4, 8)
"""Rows a micro-batch that are tried."""
RESAMPLES = 10_000


@dataclass
class Contender:
    """A started process; ``turn`` lets it make one step."""

    name: str
    process: subprocess.Popen[bytes]
    turns: Any
    answers: Any

    def ready(self) -> None:
        """Wait until it is warm."""
        if self.answers.readline().strip() != "ready":
            raise SystemExit(f"{self.name} ended before it was warm; run with --show to see why")

    def turn(self) -> float:
        """Tokens a second of one more step."""
        print("go", file=self.turns, flush=True)
        answer = self.answers.readline().split()
        if not answer:
            raise SystemExit(f"{self.name} ended in the middle of it; run with --show to see why")
        seconds, tokens = map(float, answer)
        return tokens / seconds

    def end(self) -> None:
        self.turns.close()
        self.answers.close()
        self.process.kill()
        self.process.wait()


def start(name: str, settings: dict[str, Any], peers: Path | None, *, show: bool) -> Contender:
    """A contender, warm."""
    to_it, from_it = os.pipe(), os.pipe()
    command = [sys.executable, str(HERE / "contenders.py"), name, json.dumps(settings), str(to_it[0]), str(from_it[1])]
    environment = os.environ | {"OMP_NUM_THREADS": str(settings["threads"]), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"PYTHONPATH": str(peers)} if peers else {}
    output = None if show else subprocess.DEVNULL
    process = subprocess.Popen(
        command, env=environment, pass_fds=(to_it[0], from_it[1]), stdin=subprocess.DEVNULL, stdout=output, stderr=output
    )
    os.close(to_it[0])
    os.close(from_it[1])
    contender = Contender(name, process, os.fdopen(to_it[1], "w"), os.fdopen(from_it[0]))
    contender.ready()
    return contender


def rates_of(chosen: dict[str, dict[str, Any]], rounds: int, peers: Path | None, *, show: bool) -> dict[str, list[float]]:
    """Tokens a second by label, one figure a round; ``chosen`` has the settings of each, its ``contender`` among them."""
    started: dict[str, Contender] = {}
    rates: dict[str, list[float]] = {label: [] for label in chosen}
    try:
        for label, settings in chosen.items():
            started[label] = start(settings["contender"], settings, peers, show=show)
        order = list(started)
        for number in range(rounds):
            for label in order[number % len(order) :] + order[: number % len(order)]:
                rates[label].append(started[label].turn())
    finally:
        for contender in started.values():
            contender.end()
    return rates


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median, and 95% of the medians of ``RESAMPLES`` draws of as many ratios (bootstrap)."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    return statistics.median(ratios), medians[int(0.025 * RESAMPLES)], medians[int(0.975 * RESAMPLES)]


def table(rates: dict[str, list[float]], settings: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| contender | rows a micro-batch | compiled | tokens/s, median | outgrow / it, paired: median (95%) |",
        "|---|---|---|---|---|",
    ]
    for name, found in rates.items():
        ratio, low, high = interval([ours / theirs for ours, theirs in zip(rates["outgrow"], found, strict=True)])
        paired = "" if name == "outgrow" else f"{ratio:.3f} ({low:.3f} - {high:.3f})"
        compiled = "yes" if settings[name]["compile"] else "no"
        lines.append(f"| {name} | {settings[name]['micro_rows']} | {compiled} | {statistics.median(found):,.0f} | {paired} |")
    return "\n".join(lines)


def settings_of(file: Path, kind: str, threads: int, peers: Path | None) -> dict[str, dict[str, Any]]:
    """All that each contender of a set is told, by its name; those that are not installed are left out."""
    given = yaml.safe_load(file.read_text())
    chosen = given[kind]
    own = chosen.pop("contenders")
    every = {"model": given["model"], "optimizer": given["optimizer"], "threads": threads, **chosen}
    return {
        name: {**every, **best, "contender": name} for name, best in own.items() if peers is not None or name not in ELSEWHERE
    }


def tune(chosen: dict[str, dict[str, Any]], rounds: int, peers: Path | None, *, show: bool) -> Iterator[str]:
    """Lines of a table: tokens a second of each contender by rows a micro-batch, and of the best of those compiled."""
    yield "| contender | rows a micro-batch | compiled | tokens/s, median |"
    yield "|---|---|---|---|"
    for name, settings in chosen.items():
        sizes = {str(size): {**settings, "micro_rows": size, "compile": False} for size in SIZES if size <= settings["rows"]}
        found = {size: statistics.median(rates) for size, rates in rates_of(sizes, rounds, peers, show=show).items()}
        best = max(found, key=lambda size: found[size])
        compiled = {best: {**sizes[best], "compile": True}}
        yield from (f"| {name} | {size} | no | {rate:,.0f} |" for size, rate in found.items())
        yield f"| {name} | {best} | yes | {statistics.median(rates_of(compiled, rounds, peers, show=show)[best]):,.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("dense", "ragged"), help="rows of one document each, or packed ones; else both")
    parser.add_argument("--rounds", type=int, default=14, help="rounds of one step each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, help="folder in which litgpt and TRL are installed")
    parser.add_argument("--settings", type=Path, default=HERE / "settings.yaml", help="the model, and what is best for each")
    parser.add_argument("--tune", action="store_true", help="try micro-batches and compiling")
    parser.add_argument("--show", action="store_true", help="let contenders print")
    given = parser.parse_args()
    print(f"{given.threads} thread(s), load {os.getloadavg()[0]:.1f}, {given.rounds} rounds")
    for kind in (given.set,) if given.set else ("dense", "ragged"):
        print(f"\n{kind}\n")
        settings = settings_of(given.settings, kind, given.threads, given.peers)
        if given.tune:
            for line in tune(settings, given.rounds, given.peers, show=given.show):
                print(line, flush=True)
            continue
        print(table(rates_of(settings, given.rounds, given.peers, show=given.show), settings), flush=True)


if __name__ == "__main__":
    main()
