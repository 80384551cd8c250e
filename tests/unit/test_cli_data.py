"""``outgrow data``: what the commands print, and the exit code of a mistake."""

from __future__ import annotations

from pathlib import Path

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
    assert code == 0 and shown.count("=== row ") == 2 and ".txt: tokens " in shown
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
