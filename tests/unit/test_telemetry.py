"""What a logged step's event carries of the process itself."""

from __future__ import annotations

import mmap
from typing import Any

import pytest

from outgrow.trainers import telemetry
from outgrow.trainers.telemetry import anonymous_memory


def test_memory_that_is_written_to_counts_as_anonymous() -> None:
    before = anonymous_memory()["anon"]
    with mmap.mmap(-1, 30_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
        held[:] = b"x" * len(held)
        # What was written from may still be held by the allocator.
        assert 29_000_000 < anonymous_memory()["anon"] - before < 70_000_000


def test_a_process_without_a_free_file_descriptor_trains_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*arguments: Any, **options: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(telemetry, "open", none_left, raising=False)
    assert anonymous_memory() == {}
