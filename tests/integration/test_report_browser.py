"""The report of a run in a real browser: it opens without a word of complaint or a request, draws all, and prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, browser
from doctor import need
from PIL import Image
from run_events import Story, stored, story_with_restart, write_events

from outgrow.monitoring.report import make_report
from outgrow.storage import Storage

pytestmark = pytest.mark.monitoring

PLOTS = {
    "loss",
    "streams",
    "learning_rate",
    "gradient_norm",
    "throughput",
    "mfu",
    "phases",
    "wall",
    "goodput",
    "memory",
    "traffic",
    "cache",
    "saves",
}
DRAWN = """
Object.fromEntries([...document.querySelectorAll('.plot')].map(place => {
  const size = place.querySelector('.main-svg')?.getBoundingClientRect();
  const marks = place.querySelectorAll('.trace path, .bars path, .scatterlayer .js-fill, .point').length;
  return [place.id, [size ? size.width : 0, size ? size.height : 0, marks, place.getBoundingClientRect().width]];
}))
"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    need("chromium")
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 600 steps with a restart and a failed checkpoint, and the same beside another, as files."""
    root = tmp_path_factory.mktemp("reports")
    storage = Storage(str(root))
    write_events(root, "story-ffffffff", story_with_restart().records)
    write_events(root, "other-ffffffff", Story(seed=1, level=3.4).start().train(600).end().records)
    (root / "one.html").write_text(make_report(storage, stored("story-ffffffff")))
    (root / "two.html").write_text(make_report(storage, stored("story-ffffffff"), [stored("other-ffffffff")]))
    (root / "bare.html").write_text(make_report(storage, stored("none-ffffffff")))
    return root


@pytest.mark.parametrize("name", ["one", "two"])
def test_all_plots_are_drawn_without_a_complaint_or_a_request(chromium: Browser, reports: Path, name: str) -> None:
    chromium.open(reports / f"{name}.html")
    drawn = chromium.run(DRAWN)
    assert set(drawn) == PLOTS
    for plot, (width, height, marks, room) in drawn.items():
        assert width > 400 and height > 80 and marks > 0, plot
        assert width <= room + 1, plot
    assert chromium.complaints() == []
    assert chromium.requests() == [(reports / f"{name}.html").resolve().as_uri()]


def test_a_script_of_another_would_not_run(chromium: Browser, reports: Path) -> None:
    """The page's policy works: the test would see a complaint, and a script that slipped in does nothing."""
    broken = reports / "broken.html"
    text = (reports / "one.html").read_text()
    broken.write_text(text.replace("<main>", "<main><script>window.slipped = 1</script><img src='http://127.0.0.1:9/x'>", 1))
    chromium.open(broken)
    assert chromium.run("window.slipped") is None
    assert any("Content Security Policy" in said for said in chromium.complaints())


def test_a_run_without_records_has_a_page(chromium: Browser, reports: Path) -> None:
    chromium.open(reports / "bare.html")
    assert chromium.run("document.querySelectorAll('.plot').length") == 0 and chromium.complaints() == []


def luminance(picture: Path) -> float:
    return float(Image.open(picture).convert("L").resize((1, 1)).getpixel((0, 0)))


def test_it_is_read_in_light_in_dark_and_on_paper(chromium: Browser, reports: Path) -> None:
    light, dark, paper = reports / "light.png", reports / "dark.png", reports / "paper.pdf"
    chromium.open(reports / "one.html")
    chromium.screenshot(light)
    chromium.open(reports / "one.html", dark=True)
    chromium.screenshot(dark)
    ink = chromium.run("getComputedStyle(document.querySelector('.xtick text')).fill")
    assert luminance(light) > 200 and luminance(dark) < 60
    assert min(json.loads("[" + ink[ink.index("(") + 1 : -1] + "]")) > 150  # text of plots is light on dark
    chromium.open(reports / "one.html")
    chromium.print(paper)
    data = paper.read_bytes()
    assert data.startswith(b"%PDF") and 5 <= data.count(b"/Type /Page\n") + data.count(b"/Type/Page") <= 25


def test_a_narrow_window_cuts_nothing_off(chromium: Browser, reports: Path) -> None:
    chromium.open(reports / "one.html", width=400)
    assert chromium.run("document.documentElement.scrollWidth") <= 400
