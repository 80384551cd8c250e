"""How the processes of a run meet their prefetcher and talk to it, and what it knows of its readers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outgrow.contracts import JsonDict, RunRef, ShardCounts, TierTraffic
from outgrow.errors import DataError, IntegrityError, OutgrowError, ShardError, SiteError, TrainingError
from outgrow.recipes.schema.tiers import Tier
from outgrow.storage import Storage
from outgrow.streaming.tiers import gate as gates
from outgrow.streaming.tiers.gate import Gate, Reads
from outgrow.streaming.tiers.messages import Channel, from_error, to_error
from outgrow.streaming.tiers.places import Place
from outgrow.streaming.tiers.positions import Positions
from outgrow.streaming.tiers.rendezvous import Seat, connect, gate_folder, take_seat
from outgrow.streaming.tiers.schedule import PlanCounts
from outgrow.streaming.tiers.tallies import Tallies
from outgrow.streaming.tiers.transfer import Corrupt

# --- messages ---------------------------------------------------------------------------------------------------------


@contextmanager
def channels() -> Iterator[tuple[Channel, Channel]]:
    one, other = map(Channel, socket.socketpair())
    with closing(one), closing(other):
        yield one, other


@pytest.mark.parametrize(
    "error",
    [
        DataError("no room", where="tier", hint="give more"),
        SiteError("no such tier", where="site.yaml"),
        IntegrityError("bytes differ", where="shard"),
        ShardError("nobody has it", stream="books", shard=7, where="shard", hint="repair"),
        TrainingError("failed\non two lines"),
    ],
)
def test_an_error_arrives_as_it_was(error: OutgrowError) -> None:
    with channels() as (one, other):
        other.send({"error": from_error(error)})
        with pytest.raises(type(error)) as told:
            one.ask({"ask": "anything"})
    assert (str(told.value), told.value.__dict__) == (str(error), error.__dict__)


def test_an_error_of_a_narrower_kind_arrives_as_the_wider() -> None:
    found = to_error(from_error(Corrupt("no place has it", where="shard")))
    assert (type(found), str(found)) == (IntegrityError, "shard: no place has it")


def test_the_end_of_the_other_side_is_an_end_of_file() -> None:
    with channels() as (one, other):
        other.send({"half": 1})
        other.close()
        assert one.receive() == {"half": 1}
        with pytest.raises(EOFError):
            one.receive()
        with pytest.raises(EOFError):
            one.ask({})


def test_a_message_that_breaks_off_is_an_end_of_file() -> None:
    ours, theirs = socket.socketpair()
    with closing(Channel(ours)) as channel:
        theirs.sendall(b'{"whole": 1}\n{"hal')
        theirs.close()
        assert channel.receive() == {"whole": 1}
        with pytest.raises(EOFError):
            channel.receive()


def test_closing_a_channel_ends_who_waits_at_it() -> None:
    with channels() as (one, _):
        ended = threading.Event()

        def wait() -> None:
            with pytest.raises(EOFError):
                one.receive()
            ended.set()

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.05)
        one.close()
        thread.join(5)
        assert ended.is_set()


# --- the place to meet ------------------------------------------------------------------------------------------------


def leave(seat: Seat) -> None:
    """As the kernel does when a prefetcher is killed."""
    seat.listener.close()
    os.close(seat.lock)


def test_one_seat_is_taken_at_a_time_and_free_when_its_holder_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "gates/run"
    seat = take_seat(folder)
    assert seat is not None and take_seat(folder) is None
    leave(seat)
    again = take_seat(folder)
    assert again is not None, "the socket that was left is cleared away"
    again.clear()
    assert not folder.exists()
    leave(again)


def test_nobody_listens_before_and_after(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert connect(folder) is None
    seat = take_seat(folder)
    assert seat is not None
    connection = connect(folder)
    assert connection is not None
    connection.close()
    leave(seat)
    assert connect(folder) is None


def test_a_seat_in_a_folder_that_was_cleared_is_not_mistaken_for_the_new_one(tmp_path: Path) -> None:
    old = take_seat(tmp_path / "run")
    assert old is not None
    old.clear()
    new = take_seat(tmp_path / "run")
    assert new is not None, "who still holds the lock of the cleared folder is in nobody's way"
    assert take_seat(tmp_path / "run") is None
    leave(old)
    leave(new)


def test_names_of_any_length_can_be_met_at(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 100) / ("b" * 100)
    seat = take_seat(folder)
    assert seat is not None
    with socket.socket(socket.AF_UNIX) as plain, pytest.raises(OSError, match="too long"):
        plain.connect(str(folder / "sock"))
    connection = connect(folder)
    assert connection is not None
    connection.close()
    leave(seat)


def test_the_folder_is_private(tmp_path: Path) -> None:
    seat = take_seat(tmp_path / "gates/run")
    assert seat is not None
    assert (tmp_path / "gates/run").stat().st_mode & 0o777 == 0o700
    leave(seat)
    (tmp_path / "gates/run").chmod(0o755)
    with pytest.raises(DataError, match="this user's own"):
        take_seat(tmp_path / "gates/run")


def test_a_link_is_not_taken_for_the_folder(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="this user's own"):
        take_seat(tmp_path / "run")


def test_runs_meet_apart(tmp_path: Path) -> None:
    hot = Place(name="nvme", storage=Storage(str(tmp_path / "nvme")), tier=Tier(name="nvme", path=str(tmp_path / "nvme")))
    (tmp_path / "nvme").mkdir()
    runs = [RunRef(name=name, folder="f", fingerprint=print) for name in ("a", "b") for print in ("0123456789", "9876543210")]
    folders = {gate_folder(hot, run) for run in runs}
    assert len(folders) == 4
    assert all(folder.is_relative_to(tmp_path / "nvme/shards") for folder in folders)


def test_a_lock_lives_in_the_process_that_was_handed_it(tmp_path: Path) -> None:
    seat = take_seat(tmp_path / "run")
    assert seat is not None
    code = "import sys; sys.stdin.read()"
    heir = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, pass_fds=(seat.lock,))
    leave(seat)
    assert take_seat(tmp_path / "run") is None
    heir.kill()
    heir.communicate()
    again = take_seat(tmp_path / "run")
    assert again is not None
    leave(again)


# --- gates ------------------------------------------------------------------------------------------------------------


class Answering:
    """A prefetcher that answers what it was told to, and closes each connection after so many questions."""

    def __init__(self, folder: Path, *, questions: int) -> None:
        seat = take_seat(folder)
        assert seat is not None
        self.seat = seat
        self.asked: list[JsonDict] = []
        self._questions = questions
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self.seat.listener.accept()
            except OSError:
                return
            with closing(Channel(connection)) as channel:
                self.asked.append(channel.receive())
                channel.send({"slot": "/slot"})
                for _ in range(self._questions):
                    self.asked.append(channel.receive())
                    channel.send({"elsewhere": {"streams/a/train/shard.00001.mds": "/elsewhere"}})


def test_a_gate_asks_again_where_the_prefetcher_went_away(tmp_path: Path) -> None:
    prefetcher = Answering(tmp_path / "run", questions=1)
    with closing(Gate(tmp_path / "run", rank=3, attempt="now", reader=1)) as gate:
        gate.acquire(4)
        assert gate.path("streams/a/train/shard.00000.mds") == Path("/slot/streams/a/train/shard.00000.mds")
        assert gate.path("streams/a/train/shard.00001.mds") == Path("/elsewhere")
        gate.acquire(6)
        gate.heal("a", "train", 2)
    hello = {"hello": "reader", "rank": 3, "attempt": "now", "reader": 1}
    heal = {"ask": "heal", "stream": "a", "split": "train", "shard": 2, "step": 6}
    steps = [{"ask": "step", "step": 4}, {"ask": "step", "step": 6}]
    assert prefetcher.asked == [hello, steps[0], hello, steps[1], hello, heal]
    leave(prefetcher.seat)


def test_a_prefetcher_that_ends_again_and_again_is_given_up(tmp_path: Path) -> None:
    prefetcher = Answering(tmp_path / "run", questions=0)
    with closing(Gate(tmp_path / "run", rank=0, attempt="")) as gate, pytest.raises(TrainingError, match="does not answer"):
        gate.acquire(0)
    leave(prefetcher.seat)


def test_a_prefetcher_that_never_comes_is_waited_for_no_longer_than_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "PATIENCE_S", 0.2)
    with pytest.raises(TrainingError, match="does not answer") as told:
        Gate(tmp_path / "run", rank=0, attempt="").acquire(0)
    assert str(tmp_path / "run") in str(told.value)


# --- positions --------------------------------------------------------------------------------------------------------


def reads(*positions: int) -> Reads:
    return Reads(positions=positions, stop=100)


def test_the_frontier_is_the_lowest_step_of_any_reader() -> None:
    positions = Positions()
    assert positions.frontier is None
    positions.join(0, seat=1, reads=reads(4, 5))
    positions.join(1, seat=2, reads=reads(6))
    positions.leave_step(0, 0, 4)
    assert positions.frontier == 5
    positions.leave_step(0, 1, 5)
    assert positions.frontier == 6
    positions.reach(1, 0, 40)
    assert positions.frontier == 6, "reader 0 of rank 0 goes on by two"
    positions.leave(0, seat=1)
    assert positions.frontier == 40
    assert positions.num_seen == 2


def test_a_rank_that_took_another_seat_does_not_leave_with_the_old_one() -> None:
    positions = Positions()
    positions.join(0, seat=1, reads=reads(0))
    positions.join(0, seat=2, reads=reads(3))
    positions.leave(0, seat=1)
    assert positions.frontier == 3


def test_who_is_not_there_is_not_waited_for() -> None:
    positions = Positions()
    positions.join(0, seat=1, reads=reads(0))
    positions.leave_step(7, 0, 3)
    positions.reach(7, 0, 9)
    assert positions.frontier == 0


@given(st.data())
def test_the_frontier_is_that_of_a_list_of_all_steps_left(data: Any) -> None:
    """Readers of two ranks, three and one, take their steps in any turn."""
    positions, strides = Positions(), (3, 1)
    for rank, stride in enumerate(strides):
        positions.join(rank, seat=rank, reads=reads(*range(stride)))
    left: dict[int, set[int]] = {0: set(), 1: set()}
    following = {(rank, reader): reader for rank, stride in enumerate(strides) for reader in range(stride)}
    for rank, reader in data.draw(st.lists(st.sampled_from(sorted(following)), max_size=40)):
        step = following[rank, reader]
        positions.leave_step(rank, reader, step)
        left[rank].add(step)
        following[rank, reader] += strides[rank]
        slow = min(next(step for step in range(100) if step not in left[rank]) for rank in left)
        assert positions.frontier == slow


# --- counts -----------------------------------------------------------------------------------------------------------


def told(tallies: Tallies) -> ShardCounts:
    return tallies.told(queue=0, cache_bytes=0, room_bytes=0, tiers={"hdd": TierTraffic(shards=1)})


def test_what_is_planned_is_counted_when_it_is_reached() -> None:
    tallies = Tallies(ShardCounts(visits=100, hits=60, misses=40, fetches=40))
    counts = PlanCounts()
    for step in (10, 20, 30):
        counts.visits += 5
        counts.misses += 2
        counts.hits += 3
        tallies.planned(step, counts)
    tallies.reach(9)
    assert told(tallies).visits == 100
    tallies.reach(20)
    assert (told(tallies).visits, told(tallies).hits, told(tallies).misses) == (110, 66, 44)
    tallies.plan_anew()
    tallies.reach(40)
    assert told(tallies).visits == 110, "what was ahead comes again with the new plan"
    tallies.planned(35, PlanCounts(visits=1))
    tallies.reach(40)
    assert told(tallies).visits == 111


def test_what_was_done_adds_to_what_was_before() -> None:
    tallies = Tallies(ShardCounts(fetches=3, healed=1, wait_s=2.0))
    tallies.add("fetches")
    tallies.add("read_through", 2)
    tallies.wait_s += 0.5
    found = told(tallies)
    assert (found.fetches, found.healed, found.read_through, found.wait_s) == (4, 1, 2, 2.5)
    assert found.tiers == {"hdd": TierTraffic(shards=1)}
