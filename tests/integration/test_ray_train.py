"""``outgrow train`` on an embedded Ray cluster, killed as hard as can be: the losses stay bit-identical."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from tiny_runs import Place, tiny_place, wait_for

from outgrow.cli.opening import open_recipe
from outgrow.cluster.local import run_local
from outgrow.cluster.runs import claim
from outgrow.contracts import JobSpec, StepRecord
from outgrow.streaming.build import build


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with tiny_place(tmp_path) as made:
        yield made


def losses(records: list[StepRecord]) -> dict[int, set[tuple[float | None, float | None]]]:
    """Every loss and gradient norm that was logged for each step, by all starts."""
    found: dict[int, set[tuple[float | None, float | None]]] = {}
    for record in records:
        if record.kind == "step":
            found.setdefault(record.step, set()).add((record.loss, record.grad_norm))
    return found


def straight_through(folder: Path) -> dict[int, set[tuple[float | None, float | None]]]:
    """The losses of the same recipe on two plain processes that nobody disturbs."""
    with tiny_place(folder) as place:
        words = ["schedule.options.seconds=0"]
        opened = open_recipe(place.folder / "recipe.yaml", words, place.folder / "site.yaml")
        card = build(opened.recipe, opened.site).card
        with claim(opened.site.open_storage(), opened.recipe, card.data_fingerprint, fresh=False, accept=False) as claimed:
            job = JobSpec(
                recipe=opened.recipe.to_dict(), site=opened.site.to_dict(), card=card, run=claimed.run,
                workers=2, threads_per_worker=1, device="cpu", launched=time.time(),
            )  # fmt: skip
            run_local(job, "outgrow.trainers.loop:train_worker", on_record=lambda record: None)
        return losses(place.records())


def ranks(place: Place) -> list[psutil.Process]:
    return [process for process in place.processes() if "RayTrainWorker" in " ".join(process.cmdline())]


def test_losses_are_bit_identical_through_a_killed_worker_and_a_killed_everything(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = place.start("train", "recipe.yaml")
    place.wait_for_step(14, first)
    assert len(ranks(place)) == 2
    ranks(place)[-1].send_signal(signal.SIGKILL)

    place.wait_for_step(34, first, starts=2)
    assert first.poll() is None
    assert "was lost; starting again from the newest checkpoint (restart 1 of at most 3)" in place.log()
    assert "using an embedded Ray cluster (no Ray head on this machine)" in place.log()
    place.kill_everything()
    first.wait()

    said = place.run("train", "recipe.yaml")
    assert "its lock was left by pid" in said
    assert "step 50/50  finished" in said
    wait_for(lambda: not place.processes(), "end of Ray's processes", lambda: str(place.processes()), timeout_s=20)

    monkeypatch.setenv("PYTHONPATH", place.environment["PYTHONPATH"])
    found = losses(place.records())
    expected = straight_through(tmp_path / "straight")
    assert sorted(found) == list(range(1, 51))
    assert found == expected
    starts = [record for record in place.records() if record.kind == "start"]
    assert len({record.attempt for record in starts}) == 3
    assert [record.step for record in starts][0] == 0
    assert all(record.step > 0 for record in starts[1:]), "a start went back to the beginning"
