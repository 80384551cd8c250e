"""What the agent of a node with 8 ranks and 5 old runs costs: seconds a scrape, series a rank, its memory, its processor time.

    python benchmarks/agent_scrape.py --rounds 50

Ranks are recorders in this process that make steps meanwhile; the agent is a real one, started as a run starts it.
"""

from __future__ import annotations

import argparse
import gzip
import os
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from recorded_ranks import make_step, recorder, site_at, started
from tiny_runs import free_ports

from outgrow.monitoring.agent.start import Running, end_agent, ensure_agent, find_agent
from outgrow.monitoring.recording.attempt import node_folder
from outgrow.recipes.schema.site import Site

RANKS, OLD_RUNS = 8, 5


def train(node: Path, ended: threading.Event) -> None:
    """All ranks make a step each 50 ms."""
    folder = started(node, "run", range(RANKS), device="cuda", vendor_flops=1e15)
    records = [recorder(folder, rank) for rank in range(RANKS)]
    for record in records:
        record.enter_steps()
    step = 0
    while not ended.wait(0.05):
        step += 1
        for record in records:
            record.set(loss=2.5, rank_loss=2.5, memory_allocated=1e9, memory_reserved=2e9, memory_peak=2e9, loader_ready=4)
            make_step(record, step)


def agent_of(site: Site) -> Running:
    ensure_agent(site)
    while (running := find_agent(node_folder(site))) is None:
        time.sleep(0.05)
    return running


def scrape(running: Running) -> tuple[float, str]:
    request = urllib.request.Request(f"{running.url}/metrics", headers={"Accept-Encoding": "gzip"})
    begun = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        data = answer.read()
    return time.perf_counter() - begun, gzip.decompress(data).decode()


def measure(site: Site, rounds: int) -> None:
    begun = time.perf_counter()
    running = agent_of(site)
    print(f"start to serving: {time.perf_counter() - begun:.2f} s")
    process = psutil.Process(running.pid)
    found = [scrape(running) for _ in range(rounds + 1)]
    seconds = sorted(taken for taken, _ in found[1:])
    series = [line for line in found[-1][1].splitlines() if not line.startswith("#")]
    of_run = [line for line in series if 'run="run"' in line]
    print(
        f"scrape: first {found[0][0] * 1e3:.1f} ms, then median {statistics.median(seconds) * 1e3:.1f} ms"
        f" ({seconds[0] * 1e3:.1f}-{seconds[-1] * 1e3:.1f}), {rounds} rounds"
    )
    print(f"series: {len(of_run)} of the run, {len(of_run) / RANKS:.0f} a rank; {len(series)} in all")
    print(f"agent: {process.memory_info().rss / 1e6:.0f} MB resident")
    before = process.cpu_times()
    time.sleep(20)
    after = process.cpu_times()
    used = after.user + after.system - before.user - before.system
    print(f"between scrapes: {used / 20 * 100:.1f}% of a core")
    begun = time.perf_counter()
    ensure_agent(site)
    print(f"asking for an agent that is there: {(time.perf_counter() - begun) * 1e3:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    print(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        site = site_at(Path(folder), free_ports(1)[0])
        node = node_folder(site)
        for number in range(OLD_RUNS):
            record = recorder(started(node, f"old-{number}", when=time.time() - 600))
            make_step(record, 1)
            record.close("finished")
        ended = threading.Event()
        ranks = threading.Thread(target=train, args=(node, ended))
        ranks.start()
        try:
            measure(site, rounds)
        finally:
            ended.set()
            ranks.join()
            end_agent(node)


if __name__ == "__main__":
    main()
