"""The report of a run: its figures are those of the records, counted by hand; it loads nothing, and hostile text is text."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import pytest
from lxml import html
from run_events import RECIPE, START, Story, stored, story_with_restart, write_events
from typer.testing import CliRunner

from outgrow.contracts import StepRecord
from outgrow.monitoring.report import make_report
from outgrow.monitoring.report.advice import advice
from outgrow.monitoring.report.curves import MOST_POINTS, Interval, evenly, merge, smooth, thin
from outgrow.monitoring.report.facts import RunFacts, collect
from outgrow.monitoring.report.plots import Shown, figures, label
from outgrow.storage import Storage

HOSTILE = "<script>alert(1)</script><a href='http://evil.example/'>x</a> {{ 7*7 }} \u202eabc"


def facts_of(root: Path, story: Story | list[StepRecord], run: str = "story-ffffffff", **options: Any) -> RunFacts:
    write_events(root, run, story.records if isinstance(story, Story) else story)
    return collect(Storage(str(root)), stored(run, **options))


def page_of(root: Path, story: Story | list[StepRecord], **options: Any) -> Any:
    write_events(root, "story-ffffffff", story.records if isinstance(story, Story) else story)
    return html.document_fromstring(make_report(Storage(str(root)), stored("story-ffffffff", **options)))


def tables(tree: Any) -> dict[str, list[list[str]]]:
    """Rows of every table by the title of its section."""
    return {
        section.findtext(".//h2"): [[cell.text_content() for cell in row.iter("th", "td")] for row in section.iter("tr")]
        for section in tree.iter("section")
        if section.find(".//table") is not None
    }


def record(kind: Any, step: int, at: float, attempt: str = "a", **values: Any) -> StepRecord:
    return StepRecord(kind=kind, attempt=attempt, time=START + at, step=step, steps=10, tokens=100 * step, **values)


def counters(steps: int, forward: float, **wall: float) -> dict[str, Any]:
    kinds = {f"wall_s.{kind}": seconds for kind, seconds in wall.items()}
    return {"counters": {"steps": steps, "phase_s.forward": forward, "phase_s.data_wait": 0.0, **kinds}}


# --- facts ------------------------------------------------------------------------------------------------------------


def test_what_a_restart_undid_is_left_out_and_counted(tmp_path: Path) -> None:
    run = facts_of(
        tmp_path,
        [
            record("start", 0, 0, detail={"world": 2}),
            *(record("step", step, step, loss=float(step)) for step in (1, 2, 3, 4, 5)),
            record("validation", 4, 4.5, loss=1.0),
            record("start", 2, 10, "b", detail={"world": 1, "cause": "rank_lost"}),
            *(record("step", step, 10 + step, "b", loss=10.0 + step) for step in (3, 4)),
        ],
    )
    assert [(own.step, own.loss) for own in run.steps] == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]
    assert run.validations == () and run.undone_records == 3
    assert [(own.cause, own.world, own.step, own.undone_steps, own.away_s) for own in run.starts] == [
        ("", 2, 0, 0, 0.0),
        ("rank_lost", 1, 2, 3, 5.5),
    ]
    assert run.state == "stopped"
    assert dataclasses.replace(run, stored=stored("x", owner="pid 7 on here")).state == "running (pid 7 on here)"


def test_a_step_without_a_start_between_still_wins_over_the_earlier_one(tmp_path: Path) -> None:
    run = facts_of(tmp_path, [record("step", step, at, loss=at) for at, step in enumerate((1, 2, 3, 2, 3, 4))])
    assert [(own.step, own.loss) for own in run.steps] == [(1, 0), (2, 3), (3, 4), (4, 5)]


def test_goodput_is_productive_over_wall_time(tmp_path: Path) -> None:
    run = facts_of(
        tmp_path,
        [
            record("start", 0, 0),
            record("step", 1, 10, detail=counters(1, 4.0, productive=6.0, init=4.0)),
            record("step", 2, 40, detail=counters(2, 9.0, productive=25.0, init=4.0, stalled=11.0)),
        ],
    )
    assert run.accounts[-1].wall_s == 40.0 and run.accounts[-1].goodput == pytest.approx(25 / 40)
    (interval,) = run.phases
    assert (interval.step, interval.steps, interval.seconds) == (2, 1.0, 30.0) and interval.values["forward"] == 5.0


def test_a_whole_story_adds_up(tmp_path: Path) -> None:
    story = story_with_restart()
    run = facts_of(tmp_path, story)
    assert [own.step for own in run.steps] == list(range(1, 601)) and run.undone_records == 20
    last = run.accounts[-1]
    logged = next(own for own in reversed(story.records) if own.kind == "step")
    assert last.wall_s == pytest.approx(logged.time - START)
    assert last.seconds["recompute"] == pytest.approx(20 * 0.98 * 0.5) and last.seconds["idle"] == 15.0
    assert last.goodput == pytest.approx(last.seconds["productive"] / (logged.time - START))
    assert len(run.saves) == 12 and [own.step for own in run.saves if own.error] == [250]
    assert run.shards and sum(own.values["bytes.nvme"] for own in run.traffic) <= run.shards.tiers["nvme"].bytes
    # Phases of the whole are those of the intervals, but for the first step, and for what ends with steps that were undone.
    whole = sum(own.values["forward"] for own in run.phases)
    assert whole == pytest.approx((620 - 1 - 20) * 0.3 * 0.5)
    # 64,000 tokens a second at 0.76 GFLOPs each on two devices of 989 TFLOPs
    told = dataclasses.replace(run.steps[0], tokens_per_s=64_000)
    assert run.mfu(told, "vendor") == pytest.approx(64_000 * 7.6e8 / (2 * 989e12))
    assert run.mfu(told, "measured") == pytest.approx(64_000 * 7.6e8 / (2 * 650e12))
    assert run.mfu(dataclasses.replace(told, attempt="of nobody"), "vendor") is None


def test_counters_that_fall_are_another_nodes(tmp_path: Path) -> None:
    details = [counters(1, 5.0), counters(2, 6.0), counters(1, 1.0), counters(2, 3.0)]
    run = facts_of(tmp_path, [record("step", at + 1, at, detail=detail) for at, detail in enumerate(details)])
    assert [own.values["forward"] for own in run.phases] == [1.0, 2.0]


@pytest.mark.parametrize(
    "detail", [{"counters": 7}, {"counters": {"wall_s.init": "x"}}, {"shards": {"new": 1}}, {"memory": []}]
)
def test_details_of_other_versions_cost_nothing_but_themselves(tmp_path: Path, detail: dict[str, Any]) -> None:
    run = facts_of(tmp_path, [record("step", 1, 1, loss=2.0, detail=detail), record("step", 2, 2, loss=1.0, detail=detail)])
    assert len(run.steps) == 2 and not run.accounts and run.shards is None
    assert set(figures(Shown(run=run))) == {"loss"}


# --- curves -----------------------------------------------------------------------------------------------------------


def slow_thin(points: list[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """The obvious way: cut what lies between the ends into stretches, keep each one's extremes in their order."""
    if len(points) <= most:
        return points
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for number in range(stretches):
        stretch = inner[number * len(inner) // stretches : (number + 1) * len(inner) // stretches]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept += sorted({low, high}, key=lambda p: p[0])
    return [*kept, points[-1]]


@pytest.mark.parametrize("seed", range(20))
def test_thinning_keeps_extremes_order_and_ends(seed: int) -> None:
    rng = random.Random(seed)
    points = [(float(x), rng.choice([rng.gauss(0, 1), 0.0, 100.0])) for x in range(rng.randint(1, 9_000))]
    most = rng.choice([4, 10, 501, MOST_POINTS])
    found = thin(points, most)
    assert found == slow_thin(points, most) and len(found) <= most
    assert [x for x, _ in found] == sorted({x for x, _ in found})
    assert (found[0], found[-1]) == (points[0], points[-1])
    for end in (min, max):
        assert end(y for _, y in found) == end(y for _, y in points)


def test_a_spike_of_one_step_in_a_million_stays() -> None:
    points = [(float(x), 2.0) for x in range(1_000_000)]
    points[777_777] = (777_777.0, 9.0)
    assert (777_777.0, 9.0) in thin(points)


@pytest.mark.parametrize("number", [1, 7, 120, 121, 5_000])
def test_merged_intervals_add_up(number: int) -> None:
    rng = random.Random(number)
    parts = [Interval(step=n, time=n, seconds=1.0, steps=2, values={rng.choice("ab"): rng.random()}) for n in range(number)]
    found = merge(parts, 120)
    assert len(found) == min(number, 120) and found[-1].step == number - 1
    for name in "ab":
        whole = math.fsum(own.values.get(name, 0.0) for own in parts)
        assert math.fsum(own.values.get(name, 0.0) for own in found) == pytest.approx(whole)
    assert sum(own.steps for own in found) == 2 * number and sum(own.seconds for own in found) == number


def test_the_running_mean_lags_behind_nothing() -> None:
    line = [(float(x), 3.0 * x) for x in range(1_000)]
    assert all(y == pytest.approx(3.0 * x, abs=0.05) for x, y in smooth(line)[200:-200])
    assert all(y == pytest.approx(5.0) for _, y in smooth([(float(x), 5.0) for x in range(50)]))


@pytest.mark.parametrize(("number", "most"), [(0, 5), (1, 5), (5, 5), (6, 5), (1000, 7)])
def test_even_places(number: int, most: int) -> None:
    found = list(evenly(number, most))
    assert len(found) == min(number, most) and found == sorted(set(found))
    assert not number or (found[0], found[-1]) == (0, number - 1)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_was_counted(tmp_path: Path) -> None:
    (tmp_path / "runs/story-ffffffff").mkdir(parents=True)
    plan = {"steps": 600, "tokens": 19_200_000, "workers": 2, "checkpoint_bytes": 1_500_000_000, "run_bytes": 6_000_000_000}
    (tmp_path / "runs/story-ffffffff/plan.json").write_text(json.dumps(plan))
    tree = page_of(tmp_path, story_with_restart())
    shown = tables(tree)
    assert shown["Starts"][2][1:5] == ["rank lost", "350", "2", "20"]
    assert {row[0]: row[1:] for row in shown["Plan and actual"]}["steps"] == ["600", "600"]
    assert ["250", "—", "0.40 s", "0.00 s", "0.00 s", "no space left on device"] in shown["Checkpoints"]
    assert {row[0] for row in shown["Goodput"][1:]} == {"productive", "init", "checkpoint", "recompute", "stalled", "idle"}
    prompts = [own.findtext("./header/span") for own in tree.iter("article")]
    assert prompts == ["Once upon a time", "def main(", "recipe.yaml"]
    assert "20 logged steps that were trained again" in tree.text_content()
    places = {div.get("id") for div in tree.iter("div") if div.get("class") == "plot"}
    assert places == set(json.loads(tree.get_element_by_id("figures").text)) and len(places) == 13


def test_nothing_is_loaded_from_anywhere(tmp_path: Path) -> None:
    tree = page_of(tmp_path, story_with_restart())
    assert not tree.xpath("//*[@src or @href or @action or @data or @srcset or @poster]")
    assert not tree.xpath("//link | //img | //iframe | //object | //embed | //form | //base | //a | //svg")
    assert "http" not in tree.get_element_by_id("figures").text
    policy = tree.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")[0]
    assert policy.startswith("default-src 'none';") and "http" not in policy


def test_hostile_text_is_text(tmp_path: Path) -> None:
    story = Story(steps=60).start(cause=HOSTILE).train(60, validate_every=20, save_every=20)
    story.records[-1].detail["error"] = HOSTILE
    for own in story.records:
        if own.kind == "validation":
            own.detail.update({"streams": {HOSTILE: 1.0, "other": 2.0}, "samples": [{"prompt": HOSTILE, "text": HOSTILE}]})
        elif own.kind == "step":
            own.detail["memory"] = {HOSTILE: 1e9}
            own.detail["shards"]["tiers"][HOSTILE] = own.detail["shards"]["tiers"].pop("nvme")
    recipe = RECIPE | {"run": {"name": HOSTILE, "seed": 1}}
    write_events(tmp_path, "story-ffffffff", story.records)
    page = make_report(Storage(str(tmp_path)), stored("story-ffffffff", recipe=recipe))
    tree = html.document_fromstring(page)
    before_scripts = page.partition("<script")[0]
    assert "alert(1)" in before_scripts and "<script>alert" not in page and "\u202e" not in page
    assert not tree.xpath("//a | //*[@href]") and "{{ 7*7 }}" in tree.text_content()
    figures = tree.get_element_by_id("figures").text
    assert "<" not in figures and label(HOSTILE).startswith("&lt;script&gt;")
    names = [trace["name"] for plot in json.loads(figures).values() for trace in plot["data"] if "name" in trace]
    assert label(HOSTILE) in names and not any("<" in name for name in names)


def test_records_of_before_give_what_they_have(tmp_path: Path) -> None:
    """Runs that were recorded when there were no counters, memory or causes yet."""
    tree = page_of(tmp_path, story_with_restart(full=False))
    places = {div.get("id") for div in tree.iter("div") if div.get("class") == "plot"}
    assert places == {"loss", "streams", "learning_rate", "gradient_norm", "throughput", "saves"}
    text = " ".join(tree.text_content().split())
    for words in (
        "the records of this run hold no account of its time",
        "the records of this run hold no seconds by phase",
        "the records of this run hold no memory",
        "No plan is stored with this run",
        "validation.prompts",
    ):
        assert words in text, words
    assert tables(tree)["Starts"][2][1] == "not said"


@pytest.mark.parametrize("records", [[], [record("start", 0, 0)], [record("start", 0, 0), record("step", 1, 1, loss=math.nan)]])
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path: Path, records: list[StepRecord]) -> None:
    tree = page_of(tmp_path, records)
    assert json.loads(tree.get_element_by_id("figures").text) == {} and "No step has been logged yet" in tree.text_content()


def test_numbers_that_are_none_do_not_break_the_page(tmp_path: Path) -> None:
    story = Story(steps=80).start().train(80)
    story.records[40] = dataclasses.replace(story.records[40], loss=math.inf, grad_norm=math.nan, tokens_per_s=math.nan)
    text = page_of(tmp_path, story).get_element_by_id("figures").text
    assert "NaN" not in text and "Infinity" not in text
    assert len(json.loads(text)["loss"]["data"][0]["x"]) == 79


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    write_events(tmp_path, "story-ffffffff", story_with_restart().records)
    storage = Storage(str(tmp_path))
    assert make_report(storage, stored("story-ffffffff")) == make_report(storage, stored("story-ffffffff"))


def test_runs_are_compared_by_name(tmp_path: Path) -> None:
    write_events(tmp_path, "story-ffffffff", story_with_restart().records)
    write_events(tmp_path, "other-ffffffff", Story(seed=1).start().train(300).records)
    recipe = json.loads(json.dumps(RECIPE)) | {"optimizer": {"kind": "adamw", "learning_rate": 0.001}}
    page = make_report(Storage(str(tmp_path)), stored("story-ffffffff"), [stored("other-ffffffff", recipe=recipe)])
    tree = html.document_fromstring(page)
    rows = {row[0]: row[1:] for row in tables(tree)["Compared"]}
    assert rows["optimizer.learning_rate"] == ["0.003", "0.001"] and rows["restarts"] == ["1", "0"]
    assert rows["steps"] == ["600 of 600", "300 of 600"]
    loss = json.loads(tree.get_element_by_id("figures").text)["loss"]
    assert {trace["name"].split()[0] for trace in loss["data"]} == {"story-ffffffff", "other-ffffffff"}
    assert loss["layout"]["xaxis"]["title"]["text"] == "step"


def test_steps_of_another_size_are_drawn_over_tokens(tmp_path: Path) -> None:
    one = facts_of(tmp_path, [record("step", step, step, loss=2.0) for step in range(1, 9)])
    bigger = [dataclasses.replace(own, tokens=3 * own.tokens) for own in one.steps]
    write_events(tmp_path, "big-ffffffff", bigger)
    page = make_report(Storage(str(tmp_path)), stored("story-ffffffff"), [stored("big-ffffffff")])
    loss = json.loads(html.document_fromstring(page).get_element_by_id("figures").text)["loss"]
    assert loss["layout"]["xaxis"]["title"]["text"] == "tokens" and max(loss["data"][1]["x"]) == 2_400


def test_a_long_run_gives_a_bounded_page_in_bounded_time(tmp_path: Path) -> None:
    story = Story(steps=6_000).start().train(6_000, validate_every=50, save_every=500)
    write_events(tmp_path, "story-ffffffff", story.records)
    begun = time.monotonic()
    page = make_report(Storage(str(tmp_path)), stored("story-ffffffff"))
    assert time.monotonic() - begun < 15
    drawn = json.loads(html.document_fromstring(page).get_element_by_id("figures").text)
    assert max(len(trace["x"]) for plot in drawn.values() for trace in plot["data"]) <= MOST_POINTS
    assert len(json.dumps(drawn)) < 2e6


def test_what_stands_out_is_said(tmp_path: Path) -> None:
    said = " ".join(own.says for own in advice(facts_of(tmp_path, story_with_restart())))
    assert "goodput is 82.9%" in said and "1 checkpoint failed, the last at step 250, and later ones were committed" in said
    quiet = Story(steps=3_000, step_s=2.0).start().train(3_000, validate_every=1_000, save_every=500)
    assert advice(facts_of(tmp_path, quiet, "quiet-ffffffff")) == []
    rising = [record("validation", step, step, loss=loss) for step, loss in ((1, 3.0), (2, 2.0), (3, 2.5))]
    assert "has risen from 2.0000 at step 2 to 2.5000" in advice(facts_of(tmp_path, rising, "up-ffffffff"))[0].says


def test_the_command_writes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from outgrow.cli import app

    folder = tmp_path / "storage/runs/story-ffffffff"
    write_events(tmp_path / "storage", "story-ffffffff", story_with_restart().records)
    about = {"name": "story", "fingerprint": "f" * 64, "created": "2026-09-21T14:13:20+00:00", "recipe": RECIPE}
    (folder / "run.json").write_text(json.dumps(about))
    (tmp_path / "site.yaml").write_text("schema: 1\nstorage: storage\ncache: cache\n")
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, ["report", "story"])
    assert found.exit_code == 0 and "report: story-ffffffff.html" in found.output
    assert "<title>Run story-ffffffff</title>" in (tmp_path / "story-ffffffff.html").read_text()
    found = CliRunner().invoke(app, ["report", "stury"])
    assert "did you mean story" in str(found.exception)
