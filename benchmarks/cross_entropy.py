"""Memory and time of head and cross-entropy, all scores at once against some tokens at a time, and how far gradients differ.

    python benchmarks/cross_entropy.py [--tokens 8192] [--vocabulary 131072] [--width 128]    prints a table in Markdown

Each variant runs in a process of its own, forward and backward once, in float32; its peak is the most anonymous memory that the
process has had (RssAnon, sampled), less what it had before the first product. All scores at once take some 13 GB at the
sizes of the goal: the process offers itself first to be killed where memory runs out.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

from outgrow.contracts import IGNORE_INDEX
from outgrow.trainers.head_loss import ChunkedNll
from outgrow.trainers.objective import weighted_nll

SAMPLE_S = 0.002
MB = 1e6


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no RssAnon in /proc/self/status")


class Peak:
    """The most anonymous memory while it is open, sampled every 2 ms by a thread."""

    def __enter__(self) -> Peak:
        self._before = self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes -= self._before


def measure(chunk: int, tokens: int, vocabulary: int, width: int, place: Path) -> None:
    """One pass; writes its gradients to ``place`` and prints peak, seconds, loss. ``chunk`` 0: all scores at once."""
    Path("/proc/self/oom_score_adj").write_text("1000")
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False)
    hidden = torch.randn(tokens, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    targets[::7] = IGNORE_INDEX
    weights = torch.rand(tokens)
    torch.randn(256, 256) @ torch.randn(256, 256)  # the library of products sets its buffers up
    started = time.perf_counter()
    with Peak() as peak:
        if chunk:
            loss = ChunkedNll(chunk)(head, head.forward, hidden, targets, weights)
        else:
            loss = weighted_nll(head(hidden), targets, weights)
        torch.autograd.backward(loss / weights.sum())
    seconds = time.perf_counter() - started
    torch.save({"hidden": hidden.grad, "weight": head.weight.grad}, place)
    print(peak.bytes, seconds, loss.item() / weights.sum().item())


def run(chunk: int, given: argparse.Namespace, place: Path) -> tuple[float, float, float]:
    sizes = ("--tokens", given.tokens, "--vocabulary", given.vocabulary, "--width", given.width, "--threads", given.threads)
    command = [sys.executable, __file__, *map(str, sizes), "--chunk", str(chunk), "--place", str(place)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"chunk {chunk}: ended with {done.returncode}\n{done.stderr}")
    peak, seconds, loss = map(float, done.stdout.split())
    return peak, seconds, loss


def apart(found: Path, expected: Path) -> float:
    """The largest difference of two gradients, as a share of the largest gradient of its tensor."""
    mine, theirs = (torch.load(path, weights_only=True) for path in (found, expected))
    return max(float((mine[name] - theirs[name]).abs().max() / theirs[name].abs().max()) for name in mine)


def main(given: argparse.Namespace) -> None:
    logits = given.tokens * given.vocabulary * 4
    sizes = f"{given.tokens} tokens, vocabulary {given.vocabulary}, width {given.width}"
    print(f"torch {torch.__version__}, {given.threads} threads, float32, {sizes}, load {os.getloadavg()[0]:.1f};")
    print(f"the scores of all tokens are {logits / MB:,.0f} MB\n")
    print("| tokens at a time | peak, MB | of all at once | seconds | loss | gradients apart |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole.pt")
        peak_of_whole, seconds, loss = run(0, given, whole)
        print(f"| all | {peak_of_whole / MB:,.0f} | 1 | {seconds:.1f} | {loss:.7f} | |", flush=True)
        for chunk in given.chunks:
            place = Path(folder, "chunked.pt")
            peak, seconds, loss = run(chunk, given, place)
            share = f"1/{peak_of_whole / peak:.1f}"
            print(
                f"| {chunk} | {peak / MB:,.0f} | {share} | {seconds:.1f} | {loss:.7f} | {apart(place, whole):.1e} |", flush=True
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--width", type=int, default=128, help="of the hidden states")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunks", type=int, nargs="+", default=[2048, 1024, 512, 256], help="tokens at a time")
    parser.add_argument("--chunk", type=int, help="measure this one (used by the script itself)")
    parser.add_argument("--place", type=Path, help="where gradients go (used by the script itself)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.chunk is None:
        main(arguments)
    else:
        measure(arguments.chunk, arguments.tokens, arguments.vocabulary, arguments.width, arguments.place)
