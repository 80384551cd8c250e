"""``outgrow top``: what it works out of agents' answers and records, how it draws it, and that it ends as asked."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from monitor_sites import write_password
from rich.console import Console
from run_events import FACTS, RECIPE, START, Story, stored, story_with_restart, write_events

from outgrow.contracts import StepRecord
from outgrow.monitoring.agent.start import Running
from outgrow.monitoring.recording.attempt import node_folder
from outgrow.monitoring.recording.recorder import start_ticks
from outgrow.monitoring.recording.slots import FORMAT, SLOTS, STATES, WALL
from outgrow.monitoring.top import Watch, draw
from outgrow.monitoring.top.agents import Agents, Answers, read_runs
from outgrow.monitoring.top.tail import Tail
from outgrow.monitoring.top.view import View, view
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage

RUN = "story-ffffffff"
NOW = START + 500


def slots(**values: float) -> dict[str, float | None]:
    return {slot: values.get(slot.replace(".", "_")) for slot in SLOTS}


def answer(host: str = "one", state: str = "running", *, ranks: tuple[int, ...] = (0, 1), **values: Any) -> dict[str, Any]:
    """What an agent says of a run whose ranks are all at the same step."""
    facts = {**FACTS, "run": RUN, "host": host, "attempt": "a", "started": START, "steps": 600, "local_ranks": list(ranks)}
    record = {
        "state": STATES.index("running"),
        "open_kind": WALL.index("productive"),
        "stepping": 1,
        "step": 400,
        "loss": 3.1,
        "rank_loss": 3.0,
        "tokens_per_s": 64_000,
        "touched": NOW - 1,
        "checkpoint_time": NOW - 90,
        "recent_count": 2,
        "recent_0": 0.4,
        "recent_1": 0.6,
        "wall_s_productive": 90,
        "wall_s_init": 10,
        "restarts_rank_lost": 1,
        "memory_reserved": 14e9,
        "measured_flops": 700e12,
    }
    known = {rank: {"alive": True, "record": slots(**record | values)} for rank in ranks}
    return {"facts": facts, "state": state, "ranks": {str(rank): own for rank, own in known.items()}}


def seen(
    records: list[StepRecord], *answers: dict[str, Any], owner: str = "pid 1 on one", silent: tuple[str, ...] = ()
) -> View:
    newest = {own.kind: own for own in records}
    steps = [own for own in records if own.kind == "step"][-50:]
    events = [own for own in records if own.kind != "step"][-8:]
    told = tuple(read_runs(list(answers)))
    last = records[-1] if records else None
    return view(RUN, owner, newest, last, steps, events, Answers(told=told, silent=silent), NOW)


def text_of(shown: View, width: int = 110) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(draw(shown))
    return console.file.getvalue()  # type: ignore[attr-defined]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_agents_tell_what_is_newer_than_the_records() -> None:
    found = seen(Story().start().train(120).records, answer())
    assert (found.state, found.step, found.steps, found.loss) == ("running", 400, 600, 3.1)
    assert found.remaining_s == pytest.approx(200 * 0.5)
    assert found.remaining_usd == pytest.approx(200 * 0.5 / 3600 * 2.5 * 2)
    assert found.goodput == pytest.approx(0.9) and found.wall_s == 100 and found.restarts == 1
    assert found.checkpoint_age_s == 90 and found.checkpoint_step == 100
    flops = 64_000 * 7.6e8 / 2
    assert found.mfu == {"vendor": pytest.approx(flops / 989e12), "measured": pytest.approx(flops / 700e12)}
    assert sum(found.phases.values()) == pytest.approx(1.0) and found.phases["backward"] > 0.4
    assert [line.doing for line in found.ranks] == ["step", "step"] and found.notes == ("from the agent on one",)


def test_records_alone_will_do() -> None:
    story = Story().start().train(120)
    found = seen(story.records, silent=("no node agent",))
    assert (found.state, found.step, found.ranks) == ("running", 120, ())
    assert found.loss == [own.loss for own in story.records if own.kind == "step"][-1]
    assert found.remaining_s == pytest.approx(480 * 0.5) and found.goodput is not None and 0.5 < found.goodput < 1
    assert found.shards is not None and found.shards.visits == 120 and found.mfu.keys() == {"vendor"}
    assert "no node agent" in found.notes


@pytest.mark.parametrize(
    ("records", "owner", "state"),
    [
        ([], "", "not started"),
        ([], "pid 1 on one", "starting"),
        (Story().start().train(5).records, "", "stopped"),
        (Story().start().train(5).records, "pid 1 on one", "running"),
        (story_with_restart().records, "", "finished"),
    ],
)
def test_states_by_records(records: list[StepRecord], owner: str, state: str) -> None:
    found = seen(records, owner=owner)
    assert found.state == state and (found.remaining_s is not None) == (state == "running")
    text_of(found)


@pytest.mark.parametrize("worst", ["failed", "lost", "stalled", "interrupted", "restarting"])
def test_the_worst_that_a_node_sees_is_the_runs_state(worst: str) -> None:
    found = seen([], answer("one"), answer("two", worst, ranks=(2, 3)), owner="")
    assert found.state == worst and [line.rank for line in found.ranks] == [0, 1, 2, 3]


def test_ranks_that_failed_are_started_again_by_whoever_runs_them() -> None:
    assert seen([], answer(state="failed"), owner="pid 1 on one").state == "restarting"


def test_ranks_that_are_gone_behind_or_silent_are_seen() -> None:
    told = answer(ranks=(0, 1, 2))
    told["ranks"]["1"] = {"alive": False, "record": slots(step=380, open_kind=0, touched=NOW - 50)}
    told["ranks"]["2"] = {
        "alive": True,
        "record": slots(step=399, open_kind=WALL.index("checkpoint"), stepping=0, touched=NOW - 2),
    }
    lines = seen([], told).ranks
    assert [(line.doing, line.behind, line.alive) for line in lines] == [
        ("step", 0, True),
        ("gone", 20, False),
        ("checkpoint", 1, True),
    ]
    assert lines[1].silent_s == 50 and lines[1].loss is None


def test_of_two_starts_the_newer_counts() -> None:
    from outgrow.monitoring.top.agents import _of_newest_start

    old, new = answer("one"), answer("two", ranks=(0,))
    new["facts"] |= {"attempt": "b", "started": START + 60}
    assert [own.facts["host"] for own in _of_newest_start(read_runs([old, new]))] == ["two"]


@pytest.mark.parametrize(
    "data", [None, {}, [7], [{"facts": 1}], [{"facts": {}, "ranks": {"x": 1, "0": {}, "1": {"record": 3}}}]]
)
def test_answers_that_are_none_are_passed_over(data: Any) -> None:
    assert all(own.ranks == () for own in read_runs(data))


# --- following the records --------------------------------------------------------------------------------------------


def test_the_tail_takes_each_record_once(tmp_path: Path) -> None:
    story = story_with_restart()
    tail, path = Tail(Storage(str(tmp_path)), f"runs/{RUN}"), tmp_path / "runs" / RUN / "events.jsonl"
    tail.look()
    assert tail.last is None
    write_events(tmp_path, RUN, [])
    whole, torn, taken = "", '{"kind":"step","half', 0
    for size in (1, 7, 0, 100, 350, len(story.records)):
        whole += "".join(json.dumps(own.to_dict()) + "\n" for own in story.records[taken : taken + size])
        taken = min(taken + size, len(story.records))
        path.write_text(whole + torn)  # a line is being written
        tail.look()
        assert tail.last == story.records[taken - 1]
        kept = [own for own in story.records[:taken] if own.kind == "step" and own.attempt == tail.last.attempt]
        assert list(tail.steps) == kept[-100:]
    assert taken == len(story.records) and tail.newest["end"] == story.records[-1]
    assert [own.kind for own in tail.events] == [own.kind for own in story.records if own.kind != "step"][-8:]


def test_a_long_record_is_read_from_its_end(tmp_path: Path) -> None:
    story = Story(steps=3_000).start().train(3_000, validate_every=1_000, save_every=1_000)
    write_events(tmp_path, RUN, story.records)
    tail = Tail(Storage(str(tmp_path)), f"runs/{RUN}")
    tail.look()
    begun = time.monotonic()
    tail.look()
    assert time.monotonic() - begun < 0.1 and tail.last == story.records[-1] and len(tail.steps) == 100


# --- the agents -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def agent(runs: Any, *, password: str = "") -> Iterator[str]:
    """A server that answers like a node agent; gives its address."""
    wanted = base64.b64encode(f"me:{password}".encode()).decode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            refused = password and self.headers.get("Authorization") != f"Basic {wanted}"
            body = b"" if refused else json.dumps(runs).encode()
            self.send_response(401 if refused else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def place(root: Path, url: str = "", **monitoring: Any) -> Site:
    """A site in ``root`` whose node has a living agent at ``url``."""
    site = Site.model_validate(
        {
            "storage": str(root / "storage"),
            "cache": str(root / "cache"),
            "monitoring": {"folder": str(root / "nodes"), **monitoring},
        }
    )
    node = node_folder(site)
    node.mkdir(parents=True, exist_ok=True)
    if url:
        port = int(url.rpartition(":")[2])
        running = Running(
            pid=os.getpid(),
            pid_start=start_ticks(os.getpid()),
            url=url,
            address="127.0.0.1",
            port=port,
            started=START,
            keep=False,
            format=FORMAT,
        )
        (node / "agent.json").write_text(json.dumps(running.to_dict()))
    return site


def look(site: Site) -> View:
    return Watch(site, site.open_storage(), stored(RUN).ref, lambda: "").look()


def test_the_nodes_own_agent_is_asked(tmp_path: Path) -> None:
    write_events(tmp_path / "storage", RUN, Story().start().train(5).records)
    with agent([answer(), {**answer(), "facts": FACTS | {"run": "another"}}]) as url:
        found = look(place(tmp_path, url))
    assert (found.state, found.step, len(found.ranks)) == ("running", 400, 2)


def test_a_password_is_sent_to_the_own_agent_and_its_lack_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # agents are met past it
    write_events(tmp_path / "storage", RUN, Story().start().train(5).records)
    access = {"user": "me", "password_file": str(write_password(tmp_path / "password", "secret"))}
    with agent([answer()], password="secret") as url:
        assert look(place(tmp_path, url, access=access)).step == 400
        found = look(place(tmp_path, url))
        (tmp_path / "password").chmod(0o644)
        unusable = look(place(tmp_path, url, access=access))
    assert found.step == 5 and any("asks for a password" in note for note in found.notes)
    assert unusable.step == 5 and any("others may read this file" in note for note in unusable.notes)


def test_a_password_goes_to_no_other_node_without_the_sites_certificate(tmp_path: Path) -> None:
    """Where other nodes' agents are is read from the storage, which others may write."""
    access = {"user": "me", "password_file": str(write_password(tmp_path / "password", "secret"))}
    site = place(tmp_path, "http://127.0.0.1:9", access=access)
    agents = Agents(site, site.open_storage())
    agents._urls()
    assert agents._client("http://127.0.0.1:9").password == "secret"
    assert [agents._client(f"{scheme}://thief.example").password for scheme in ("http", "https")] == ["", ""]


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", ""])
def test_without_an_agent_the_records_are_shown(tmp_path: Path, url: str) -> None:
    write_events(tmp_path / "storage", RUN, Story().start().train(5).records)
    found = look(place(tmp_path, url))
    assert found.step == 5 and found.state == "stopped" and "records alone" in found.notes[0]


def test_an_answer_that_is_garbage_costs_only_itself(tmp_path: Path) -> None:
    write_events(tmp_path / "storage", RUN, Story().start().train(5).records)
    with agent("nonsense") as url:
        assert look(place(tmp_path, url)).step == 5


# --- the screen -------------------------------------------------------------------------------------------------------


def test_the_screen_shows_all_of_it() -> None:
    text = text_of(seen(story_with_restart().records[:-300], answer()))
    for words in ("running", "66.7%", "step 400 of 600", "1m40s left", "$0.14", "3.1000", "64,000", "goodput", "90.0%", "nvme"):
        assert words in text, words
    later = text_of(seen(story_with_restart().records[:-240], answer()))
    assert "resumed on 2 rank(s) (rank lost)" in later
    assert "checkpoint FAILED: no space left" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_screen_fits_any_terminal(width: int) -> None:
    text = text_of(seen(story_with_restart().records, answer()), width)
    assert max(map(len, text.splitlines())) <= width


def test_hostile_names_draw_nothing() -> None:
    hostile = "[bold red]x[/] \x1b[2J\x1b]0;evil\x07 \u202e"
    story = Story().start().train(5, save_every=5)
    story.records[-1].detail["error"] = hostile
    told = answer(host=hostile)
    found = dataclasses.replace(seen(story.records, told), run=hostile)
    text = text_of(found, 300)
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text and "[bold red]x[/]" in text


def test_many_ranks_show_those_in_trouble() -> None:
    told = answer(ranks=tuple(range(64)))
    told["ranks"]["63"]["alive"] = False
    text = text_of(seen([], told, answer("two", "lost", ranks=())))
    assert "and 48 more" in text and "gone" in text


# --- the command ------------------------------------------------------------------------------------------------------


def command(tmp_path: Path, *words: str) -> list[str]:
    write_events(tmp_path / "storage", RUN, Story().start().train(40).records)
    about = {"name": "story", "fingerprint": "f" * 64, "created": "2026-09-21T14:13:20+00:00", "recipe": RECIPE}
    (tmp_path / "storage/runs" / RUN / "run.json").write_text(json.dumps(about))
    (tmp_path / "site.yaml").write_text("schema: 1\nstorage: storage\ncache: cache\nmonitoring: {folder: nodes}\n")
    return [sys.executable, "-m", "outgrow", "top", "story", *words]


def test_without_a_terminal_it_prints_once_and_ends(tmp_path: Path) -> None:
    ended = subprocess.run(command(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0 and not ended.stderr, ended.stderr
    assert "story-ffffffff  stopped" in ended.stdout and "step 40 of 600" in ended.stdout and "\x1b" not in ended.stdout


def test_on_a_terminal_it_goes_on_until_ctrl_c(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    words = command(tmp_path, "--interval", "0.2")
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "50"}
    started = subprocess.Popen(words, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):
        deadline = time.monotonic() + 60
        sent = False
        while time.monotonic() < deadline:
            shown += os.read(ours, 65536)
            if not sent and shown.count(b"step 40 of 600") >= 2:
                started.send_signal(signal.SIGINT)
                sent = True
    os.close(ours)
    assert started.wait(30) == 0
    assert b"Traceback" not in shown and shown.count(b"step 40 of 600") >= 2
    assert b"\x1b[?1049l" in shown  # the terminal is given back as it was
