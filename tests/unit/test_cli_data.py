"""``outgrow data``: what the commands print, and the exit code of a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from text_recipes import make_recipe, make_site, text, text_stream, write_texts

from outgrow.cli import main


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Arguments of a command: the recipe, and the site with its option."""
    write_texts(tmp_path / "prose", 30)
    site = make_site(tmp_path, prose=tmp_path / "prose")
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site.to_dict()))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(make_recipe(text_stream()).to_dict()))
    return [str(tmp_path / "recipe.yaml"), "--site", str(tmp_path / "site.yaml")]


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["data", *words])
    out = capsys.readouterr()
    return int(caught.value.code or 0), out.out, out.err


def test_build_card_inspect_and_verify(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "card", *files)
    assert (code, out) == (2, "")
    assert "its dataset is not built" in err and "outgrow data build" in err

    code, out, err = run(capsys, "build", *files)
    assert code == 0 and out.startswith("built dataset datasets/")
    assert "tokens 100%" in err and "tokens/s" in err  # plain lines, as there is no terminal
    _, described, _ = run(capsys, "card", *files)
    assert out.endswith(described)
    assert "in rows of 16" not in described and "rows of 16" in described

    assert run(capsys, "build", *files)[1].startswith("nothing to do")
    code, shown, _ = run(capsys, "inspect", "--rows", "2", *files)
    assert code == 0 and shown.count("=== step 0: row ") == 2 and ".txt: tokens " in shown
    assert any(line in shown for number in range(30) for line in text(number, 60).split())
    assert "every digest holds" in run(capsys, "verify", *files)[1]


def test_verify_fails_on_a_flipped_byte(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "build", *files)
    (shard,) = (tmp_path / "storage").rglob("streams/prose/train/*.mds")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    code, _, err = run(capsys, "verify", *files)
    assert code == 1 and "shard.00000.mds: the bytes differ from their digest" in err


def test_builds_that_never_finished_are_listed_and_removed(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    left = tmp_path / "storage/datasets/.unfinished-0123456789abcdef"
    (left / "parts").mkdir(parents=True)
    (left / "parts" / "x").write_bytes(bytes(2_000_000))
    out = run(capsys, "build", *files)[1]
    assert "1 other build(s) never finished and take 0.00 GB: outgrow data unfinished shows them" in out
    code, out, _ = run(capsys, "unfinished", *files[1:])
    assert code == 0 and "datasets/0123456789abcdef: 2.0 MB, last written to 0.0 days ago, kept" in out
    assert "kept" in run(capsys, "unfinished", "--remove-older", "1", *files[1:])[1] and left.exists()
    assert "removed" in run(capsys, "unfinished", "--remove-older", "0", *files[1:])[1] and not left.exists()
    assert run(capsys, "unfinished", *files[1:])[1] == ""


def test_ctrl_c_says_that_the_build_can_go_on(
    files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("outgrow.streaming.build.write_store", interrupted)
    code, _, err = run(capsys, "build", *files)
    assert code == 130 and "the same command goes on with what is finished" in err


def test_dropped_documents_are_listed(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        (tmp_path / "prose" / f"empty{number}.txt").touch()
    run(capsys, "build", *files)
    _, out, _ = run(capsys, "dropped", *files)
    assert out.count("prose  empty  empty") == 3
    _, out, _ = run(capsys, "dropped", "--stream", "prose", "--reason", "empty", "--limit", "1", *files)
    assert "empty0.txt" in out and "and 2 more: --limit 0 shows all" in out and "empty1.txt" not in out
    code, _, err = run(capsys, "dropped", "--reason", "ugly", *files)
    assert code == 2 and "no document is dropped for 'ugly'" in err


def test_a_report_is_written(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "build", *files)
    code, out, _ = run(capsys, "report", "--out", str(tmp_path / "r.html"), *files)
    assert code == 0 and out == f"report: {tmp_path}/r.html\n"
    assert "<html" in (tmp_path / "r.html").read_text()


def test_streams_are_proposed_for_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "prose", 3)
    code, out, _ = run(capsys, "detect", str(tmp_path / "prose"))
    assert code == 0
    (stream,) = yaml.safe_load(out)["streams"]
    assert stream["source"]["kind"] == "text"
    code, _, err = run(capsys, "detect", str(tmp_path / "nothing"))
    assert code == 2 and "there is no such file or folder" in err


def test_a_build_on_ray_takes_all_cpus_of_the_cluster(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which cluster, and how many processes; that the map itself works is seen on a real cluster."""
    from outgrow.cluster.ray_cluster import Node, RayCluster, Target
    from outgrow.streaming.pool import ordered_map

    asked: list[int] = []
    nodes = tuple(Node(id=name, name=name, cpus=3, gpus=0) for name in "ab")

    def ray_map(make_work: Any, items: Any, processes: int) -> Any:
        asked.append(processes)
        return ordered_map(make_work, items, 1)

    @contextmanager
    def connect(target: Target, cluster: object, **cpus_and_gpus: int) -> Iterator[RayCluster]:
        yield RayCluster(address="10.0.0.1:6379", embedded=False, nodes=nodes)

    monkeypatch.setattr("outgrow.cluster.ray_cluster.locate", lambda _: Target(address="10.0.0.1:6379", reason="named"))
    monkeypatch.setattr("outgrow.cluster.ray_cluster.connect", connect)
    monkeypatch.setattr("outgrow.cluster.ray_map.ray_map", ray_map)
    monkeypatch.setattr("outgrow.streaming.build.UNIT_BYTES", 10)
    site = yaml.safe_load((tmp_path / "site.yaml").read_text()) | {"build_processes": "auto"}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(site))
    code, out, _ = run(capsys, "build", "--ray", *files)
    assert code == 0 and asked == [6]
    assert "using the Ray cluster at 10.0.0.1:6379 (named)" in out and "built dataset" in out
    assert "nothing to do" in run(capsys, "build", *files)[1]
