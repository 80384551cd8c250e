"""What an asynchronous save costs the training loop: its pause against one memcpy of the state, and slower steps behind it.

    OMP_NUM_THREADS=2 python benchmarks/checkpoint_pause.py --hidden 768 --layers 12 --rounds 15

Each round measures, one after the other and so under the same load: a memcpy of as many bytes between two touched buffers, the
pause of ``save``, some steps (matrix products of the model's shapes) while the save is written, and as many steps without one.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from outgrow.storage import Storage
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer

STEPS = 10


def llama_state(hidden: int, layers: int, vocab: int) -> dict[str, torch.Tensor]:
    """fp32 parameters of a Llama and their AdamW states, by the names that an engine gives them."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden), "norm": (hidden,)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.{name}": (hidden, hidden) for name in ("q_proj", "o_proj")}
        shapes |= {f"layers.{layer}.{name}": (hidden // 4, hidden) for name in ("k_proj", "v_proj")}
        shapes |= {f"layers.{layer}.{name}": (3 * hidden, hidden) for name in ("gate_proj", "up_proj")}
        shapes |= {f"layers.{layer}.down_proj": (hidden, 3 * hidden)}
        shapes |= {f"layers.{layer}.{name}": (hidden,) for name in ("input_norm", "post_norm")}
    state = {}
    for name, shape in shapes.items():
        state[f"model/{name}"] = torch.randn(shape)
        state |= {f"optim/{name}/{key}": torch.randn(shape) for key in ("exp_avg", "exp_avg_sq")}
        state[f"optim/{name}/step"] = torch.tensor(1.0)
    return state


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def spread(values: list[float], scale: float = 1.0) -> str:
    """Median and range."""
    low, middle, high = min(values) * scale, statistics.median(values) * scale, max(values) * scale
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", default=None, help="where to save; a temporary folder by default")
    args = parser.parse_args()

    state = llama_state(args.hidden, args.layers, args.vocab)
    folder = tempfile.mkdtemp(dir=args.folder)
    try:
        saver = Checkpointer(Storage(folder), Group("runs/bench", "a", 0, 1), state, Retention(newest=1, best=0))
        source = torch.randn(saver.buffer_bytes // 4)
        target = torch.zeros_like(source)
        x, w = torch.randn(2048, args.hidden), torch.randn(args.hidden, 3 * args.hidden)

        def memcpy() -> None:
            ctypes.memmove(target.data_ptr(), source.data_ptr(), source.numel() * 4)

        def steps() -> None:
            for _ in range(STEPS):
                x @ w

        ratios, pauses, slower = [], [], []
        for number in range(args.rounds + 1):
            raw = seconds(memcpy)
            pause = seconds(lambda n=number: saver.save(state, StepState(n, {}, {}, {})))  # type: ignore[misc]
            behind = seconds(steps)
            written_within = not saver.busy()
            saver.wait()
            alone = seconds(steps)
            # The first round warms caches and file system; it is not steady state.
            if number:
                ratios.append(pause / raw)
                pauses.append(pause)
                if not written_within:
                    slower.append(behind / alone)
        results = [result for result in saver.results() if result.ref][1:]
        megabytes = saver.buffer_bytes / 1e6
        write_s = [result.write_s for result in results]
        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads")
        print(f"state: {megabytes:.0f} MB in {len(state)} tensors; {args.rounds} paired rounds, median (range)")
        print(f"pause / memcpy: {spread(ratios)}")
        print(f"pause: {spread(pauses, 1e3)} ms")
        print(f"write and digest, behind: {spread(write_s)} s, {megabytes / statistics.median(write_s):.0f} MB/s")
        print(f"commit, behind: {spread([result.commit_s for result in results])} s")
        print(
            f"step time while writing / alone: {spread(slower)}"
            if slower
            else "written before the steps ended: no slowdown measured"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
