"""The profile window: which steps, which files, and that nothing of it can stop a run."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from outgrow.monitoring.memory_history import history_of, render_history, stack_of
from outgrow.recipes.schema.training import Profile
from outgrow.storage import Storage
from outgrow.trainers.profiling import ProfileWindow

CPU = torch.device("cpu")


def train(profile: Profile, tmp_path: Path, *, rank: int = 0, first: int = 0, last: int = 8) -> ProfileWindow:
    """Steps that are a product of matrices each, the number of the step in its size."""
    window = ProfileWindow(profile, rank, Storage(str(tmp_path)), "runs/r", CPU, first)
    for step in range(first + 1, last + 1):
        torch.ones(step, step) @ torch.ones(step, step)
        window.step(step)
    window.close()
    return window


def steps_of(path: Path) -> dict[str, list[list[int]]]:
    """The sizes of the matrices that were multiplied in each step of a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    steps = [event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith("step ")]
    products = [event for event in events if event["name"] == "aten::mm"]
    found: dict[str, list[list[int]]] = {step["name"]: [] for step in steps}
    for product in products:
        within = [s["name"] for s in steps if s["ts"] <= product["ts"] <= s["ts"] + s["dur"]]
        assert len(within) == 1
        found[within[0]].append(product["args"]["Input Dims"][0])
    return found


@pytest.mark.parametrize(
    ("start", "first", "expected"), [(1, 0, (1, 2, 3)), (4, 0, (4, 5, 6)), (4, 4, (5, 6)), (3, 2, (3, 4, 5))]
)
def test_the_trace_holds_the_steps_of_the_window(tmp_path: Path, start: int, first: int, expected: tuple[int, ...]) -> None:
    assert train(Profile(start_step=start, steps=3), tmp_path, first=first).failure == ""
    name = f"rank-00000-steps-{expected[0]}-{expected[-1]}.trace.json.gz"
    assert [path.name for path in (tmp_path / "runs/r/profiles").iterdir()] == [name]
    assert steps_of(tmp_path / "runs/r/profiles" / name) == {f"step {n}": [[n, n]] for n in expected}


def test_a_run_that_ends_within_the_window_has_what_there_was(tmp_path: Path) -> None:
    train(Profile(start_step=7, steps=50), tmp_path)
    path = tmp_path / "runs/r/profiles/rank-00000-steps-7-56.trace.json.gz"
    assert {name: sizes for name, sizes in steps_of(path).items() if sizes} == {"step 7": [[7, 7]], "step 8": [[8, 8]]}


@pytest.mark.parametrize(
    ("profile", "rank", "first"),
    [
        (Profile(), 0, 0),
        (Profile(steps=2, ranks=(1,)), 0, 0),
        (Profile(start_step=2, steps=2), 0, 3),
        (Profile(start_step=20, steps=2), 0, 0),
    ],
)
def test_no_window_no_file(tmp_path: Path, profile: Profile, rank: int, first: int) -> None:
    assert train(profile, tmp_path, rank=rank, first=first).failure == ""
    assert not (tmp_path / "runs").exists()


def test_without_a_window_a_step_costs_less_than_a_microsecond(tmp_path: Path) -> None:
    window = ProfileWindow(Profile(), 0, Storage(str(tmp_path)), "r", CPU, 0)
    best = 1.0
    for _ in range(5):
        started = time.thread_time()
        for step in range(10_000):
            window.step(step)
        best = min(best, (time.thread_time() - started) / 10_000)
    assert best < 1e-6


def test_a_profiler_or_a_disk_that_fails_ends_the_window_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "runs").write_text("a file in the place of the folder")
    assert train(Profile(start_step=2, steps=2), tmp_path).failure.startswith("NotADirectoryError")

    def broken(**options: Any) -> None:
        raise RuntimeError("another profiler is on")

    monkeypatch.setattr(torch.profiler, "profile", broken)
    assert train(Profile(start_step=2, steps=2), tmp_path).failure == "RuntimeError: another profiler is on"
    assert len(caplog.records) == 2


def test_a_window_that_fails_leaves_no_history_of_allocations_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "memory", fake)

    def broken(**options: Any) -> None:
        raise RuntimeError("another profiler is on")

    monkeypatch.setattr(torch.profiler, "profile", broken)
    ProfileWindow(Profile(start_step=1, steps=2, memory=True), 0, Storage(str(tmp_path)), "r", torch.device("cuda", 0), 0)
    assert fake.asked == ["all", None]


def test_a_history_of_allocations_without_cuda_is_not_skipped_in_silence(tmp_path: Path) -> None:
    assert "cuda alone" in train(Profile(start_step=2, steps=2, memory=True), tmp_path).failure
    assert len(list((tmp_path / "runs/r/profiles").iterdir())) == 1


# --- the history of allocations ---------------------------------------------------------------------------------------


def frame(name: str, filename: str = "/home/me/model.py") -> dict[str, Any]:
    return {"name": name, "filename": filename, "line": 7}


def event(action: str, addr: int, size: int, at: int, *frames: dict[str, Any]) -> dict[str, Any]:
    return {"action": action, "addr": addr, "size": size, "time_us": 1_000_000 + at, "frames": list(frames)}


def snapshot() -> dict[str, Any]:
    """1,000 bytes from before, of which 300 are freed; at the peak 1,700."""
    inner = frame("linear", "/site-packages/torch/nn.py")
    trace = [
        event("segment_alloc", 0, 9000, 0),
        event("alloc", 1, 600, 10, inner, frame("forward")),
        event("alloc", 2, 100, 20, frame("loss")),
        event("free_requested", 1, 600, 30),
        event("free_completed", 1, 600, 40),
        event("free_completed", 9, 300, 50),
        event("alloc", 1, 200, 1_000_000, frame("step")),
    ]
    blocks = [(700, "active_allocated"), (300, "active_pending_free"), (8000, "inactive")]
    segments = [
        {"device": 1, "blocks": [{"size": size, "state": state} for size, state in blocks]},
        {"device": 0, "blocks": [{"size": 77, "state": "active_allocated"}]},
    ]
    return {"device_traces": [[], trace], "segments": segments}


def test_a_history_is_replayed_back_from_what_is_allocated_at_its_end() -> None:
    history = history_of(snapshot(), 1)
    assert history.allocated == (1000, 1000, 1600, 1700, 1700, 1100, 800, 1000)
    assert history.seconds[-1] == 1.0 and history.peak == 1700
    where = "/home/me/model.py:7"
    assert history.holders == ((f"forward  {where}", 600, 1), (f"loss  {where}", 100, 1), ("there before the window", 1000, 0))
    empty = history_of({"device_traces": [], "segments": []}, 0)
    assert empty.allocated == (0,)


def test_the_page_of_a_history_loads_nothing_and_escapes_names() -> None:
    data = snapshot()
    data["device_traces"][1][2]["frames"] = [frame("<script>alert(1)</script>")]
    page = render_history(history_of(data, 1), "rank-00000: device memory")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<script>alert" not in page
    assert "0.000 GB" in page and "there before the window" in page
    assert "pickle" not in page.partition("<script")[0] and "cdn." not in page.partition("<script")[0]


def test_a_long_history_keeps_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = [event("alloc", n, 10**9 if n == 5001 else 1, n) for n in range(20_000)]
    page = render_history(history_of({"device_traces": [trace], "segments": []}, 0), "long")
    assert len(page) < 8_000_000


def test_a_stack_shows_the_users_own_lines() -> None:
    library = frame("linear", "/site-packages/torch/nn.py")
    assert stack_of([library, frame("forward")]) == "forward  /home/me/model.py:7"
    assert stack_of([library]) == "linear  /site-packages/torch/nn.py:7"
    assert stack_of([]) == "no Python stack"


class FakeCuda:
    """What the window asks of ``torch.cuda.memory``."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def _record_memory_history(self, enabled: str | None = "all", **options: Any) -> None:
        self.asked.append(enabled)

    def _snapshot(self) -> dict[str, Any]:
        return snapshot()


def test_on_cuda_a_page_of_allocations_lies_beside_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCuda()
    monkeypatch.setattr(torch.cuda, "memory", fake)
    real = torch.profiler.profile
    monkeypatch.setattr(torch.profiler, "profile", lambda activities, **options: real(activities=activities[:1], **options))
    window = ProfileWindow(
        Profile(start_step=2, steps=2, memory=True), 0, Storage(str(tmp_path)), "runs/r", torch.device("cuda", 1), 0
    )
    for step in range(1, 6):
        window.step(step)
    window.close()
    assert window.failure == ""
    assert fake.asked == ["all", None]
    names = sorted(path.name for path in (tmp_path / "runs/r/profiles").iterdir())
    assert names == ["rank-00000-steps-2-3.memory.html", "rank-00000-steps-2-3.trace.json.gz"]
