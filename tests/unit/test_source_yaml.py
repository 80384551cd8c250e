"""YAML scenes: the author's text is kept, items are written anew without loss, and what would hurt is refused with its line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from read_files import read, read_one, refused, text_of

from outgrow.streaming.sources import BadRecordError, Document, yaml_nodes

SCENE = """\
# Сцена на реке
speaker: Лоцман   # старший
intent: warn

phase: "start"
lines:
  - text: |
      Не греби.
        Тише!
    when: 2024-01-01
  - {text: 'Да', sure: yes, share: 1e-3, at: 010:30}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "scene.yaml"


def documents(path: Path, text: str, **options: Any) -> list[Document | BadRecordError]:
    path.write_text(text, encoding="utf-8")
    return read("yaml", path, **options)


def body(document: Document | BadRecordError) -> str:
    assert isinstance(document, Document)
    return str(document.content)


# --- whole documents --------------------------------------------------------------------------------------------------


def test_a_document_keeps_its_authors_text(path: Path) -> None:
    (document,) = documents(path, SCENE, keep=("speaker", "intent", "phase", "none"))
    assert body(document) == f"```yaml\n{SCENE}```"
    assert isinstance(document, Document)
    assert document.source == "scene.yaml#2"
    assert document.meta == {"speaker": "Лоцман", "intent": "warn", "phase": "start"}


def test_without_a_fence_it_is_the_text_alone(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf\r\n" + SCENE.replace("\n", "\r\n").encode())
    document = read_one("yaml", path, fence=False)
    assert document.content == SCENE.rstrip()


@pytest.mark.parametrize(("held", "mark"), [("``", "```"), ("```", "````"), ("``````", "```````")])
def test_the_fence_is_longer_than_what_it_holds(path: Path, held: str, mark: str) -> None:
    (document,) = documents(path, f"code: |\n  {held}js\n")
    assert body(document) == f"{mark}yaml\ncode: |\n  {held}js\n{mark}"


def test_kept_values_are_json_and_scalars_those_of_recipes(path: Path) -> None:
    text = "a: yes\nb: 2024-01-01\nc: 010:30\nd: 1e-3\ne: ~\nf: [1_000, 'x', {1: true}]\ng: .inf\nh: !!str 5\ni: &x 7\nj: *x\n"
    (document,) = documents(path, text, keep=tuple("abcdefghij"))
    assert isinstance(document, Document)
    expected = {"a": "yes", "b": "2024-01-01", "c": "010:30", "d": 0.001, "e": None, "f": [1000, "x", {"1": True}]}
    assert document.meta == expected | {"g": ".inf", "h": "5", "i": 7, "j": 7}


def test_documents_of_a_file_stand_by_themselves(path: Path) -> None:
    text = (
        "%YAML 1.1\n# head\n---\na: 1 # Ж😀\n--- # b\nb: 2\n# after b\n...\n# before c\n---\n\n\n  c: 3\n"
        "  d: 4\n--- {e: 5}\n---\n- f\n---\n# nothing\n---\n"
    )
    found = documents(path, text, fence=False)
    texts = ["# head\na: 1 # Ж😀", "# b\nb: 2\n# after b", "# before c\n  c: 3\n  d: 4", "{e: 5}", "- f"]
    assert [body(document) for document in found[:5]] == texts
    assert [document.source for document in found[:5]] == [f"scene.yaml#{line}" for line in (4, 6, 13, 15, 17)]
    assert [(str(bad), getattr(bad, "reason", ""), getattr(bad, "line", 0)) for bad in found[5:]] == [
        ("the YAML document is empty", "empty", 18),
        ("the YAML document is empty", "empty", 20),
    ]


def test_every_text_means_what_its_document_meant(path: Path) -> None:
    """Random documents, joined in one file and cut again, load as they were."""
    draw = random.Random(3)

    def value(depth: int) -> Any:
        kind = draw.randrange(6 if depth < 4 else 4)
        if kind == 4:
            return [value(depth + 1) for _ in range(draw.randrange(4))]
        if kind == 5:
            return {f"k{n}": value(depth + 1) for n in range(draw.randrange(4))}
        return draw.choice(
            ["Ёж: да", "a # b", "--- x", "x\n---\ny\n", "  - z", "```", "😀", "...", 5, 1.5, True, None, "", "true"]
        )

    values = [{"root": value(0)} for _ in range(60)]
    styles: list[dict[str, Any]] = [{}, {"default_flow_style": True}, {"default_style": "|"}, {"explicit_end": True}]
    texts = [yaml.safe_dump(v, allow_unicode=True, sort_keys=False, **draw.choice(styles)) for v in values]
    found = documents(path, "".join(f"---\n# c{n}\n{text}" for n, text in enumerate(texts)), fence=False)
    assert [yaml.safe_load(body(document) + "\n") for document in found] == values
    assert all(body(document).startswith(f"# c{n}\n") for n, document in enumerate(found))
    items = documents(path, yaml.safe_dump({"a": {"b": values}}, allow_unicode=True), records="a.b", fence=False)
    assert [yaml.safe_load(body(document) + "\n") for document in items] == values


# --- records ----------------------------------------------------------------------------------------------------------


def test_items_of_a_list_are_written_as_they_were(path: Path) -> None:
    first, second = documents(path, SCENE, records="lines", keep=("text", "sure"))
    assert body(first) == "```yaml\ntext: |\n  Не греби.\n    Тише!\nwhen: 2024-01-01\n```"
    assert body(second) == "```yaml\n{text: 'Да', sure: yes, share: 1e-3, at: '010:30'}\n```"
    assert [document.source for document in (first, second)] == ["scene.yaml#7", "scene.yaml#11"]
    assert isinstance(first, Document) and isinstance(second, Document)
    assert (first.meta, second.meta) == ({"text": "Не греби.\n  Тише!\n"}, {"text": "Да", "sure": "yes"})


def test_items_may_be_nested_long_plain_or_share_parts(path: Path) -> None:
    long = "слово " * 60
    text = f"base: &b {{x: 1}}\nact:\n  scenes:\n  - {long}\n  - [1, 2]\n  - u: *b\n    v: *b\n    <<: *b\n"
    found = documents(path, text, records="act.scenes", fence=False)
    assert [body(document) for document in found] == [long.strip(), "[1, 2]", "u: {x: 1}\nv: {x: 1}\n<<: {x: 1}"]


def test_items_that_are_null_are_counted_as_empty(path: Path) -> None:
    found = documents(path, "scenes:\n- a\n-\n- ~\n- 'null'\n", records="scenes", fence=False)
    bad = [item for item in found if isinstance(item, BadRecordError)]
    assert [(item.reason, item.line) for item in bad] == [("empty", 3), ("empty", 4)]
    assert [body(item) for item in found if item not in bad] == ["a", "'null'"]


@pytest.mark.parametrize(
    ("text", "records", "message", "line"),
    [
        ("a:\n  b: 1\n", "a.c", "there is no 'c' of 'a.c'; its keys: b", 2),
        ("- 1\n", "a", "there is no 'a' of 'a'; it holds no mapping there", 1),
        ("x: 1\na:\n  b: 1\n", "a", "'a' is no list", 3),
    ],
)
def test_a_list_that_is_not_there_is_named(path: Path, text: str, records: str, message: str, line: int) -> None:
    path.write_text(text)
    assert refused("yaml", path, message, records=records).line == line


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        ("a: 1\nb: !!python/object/apply:os.system [date]\n", "the tag !!python/object/apply:os.system is not allowed", 2),
        ("a: !scene {b: 1}\n", "the tag !scene is not allowed", 1),
        ("a: 1\nb: 2\na: 3\n", "the key 'a' is given twice", 3),
        ("a:\n  b: {c: 1, c: 2}\n", "the key 'c' is given twice", 2),
        ("a: &x [*x]\n", r"the alias \*x stands for what it is part of", 1),
        ("a: *x\n", r"the alias \*x stands for nothing above it", 1),
        ("just words\n", "it holds a single value; allowed: a mapping or a list", 1),
        ("a: [1,\nb: 2\n", "not valid YAML", 3),
        ("a: 1\n\tb: 2\n", "not valid YAML", 2),
        ("a: b: c\n", "not valid YAML: mapping values are not allowed", 1),
        ("a: 'x\n", "not valid YAML: found unexpected end of stream", 2),
        ("a: \x01\n", "not valid YAML", 0),
        ("[" * 101 + "]" * 101, "nested too deeply; at most 100 levels", 1),
        ("[" * 1_000_000, "nested too deeply; at most 100 levels", 1),
        ("\n".join(" " * depth + "a:" for depth in range(150)), "nested too deeply; at most 100 levels", 101),
    ],
)
def test_what_is_wrong_is_named_with_its_line(path: Path, text: str, message: str, line: int) -> None:
    path.write_bytes(text.encode())
    assert refused("yaml", path, message).line == line


def test_a_bad_document_costs_itself_alone(path: Path) -> None:
    first, second, third = documents(path, "a: 1\n---\nb: !!python/name:os.system\n---\nc: 3\n", fence=False)
    assert (body(first), body(third)) == ("a: 1", "c: 3")
    assert isinstance(second, BadRecordError)
    assert (second.line, second.content) == (3, "b: !!python/name:os.system")


def test_documents_before_a_mistake_in_the_syntax_are_read(path: Path) -> None:
    path.write_text("a: 1\n---\nb: [\n")
    found = []
    with pytest.raises(BadRecordError, match="not valid YAML"):
        for document in _reader().read(path, "x"):
            found.append(document)
    assert len(found) == 1


def _reader() -> Any:
    from outgrow.recipes.schema.sources import YamlSource
    from outgrow.streaming.sources import file_reader

    return file_reader(YamlSource(kind="yaml", path="x"))


def test_aliases_that_multiply_are_refused_where_they_are_written_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_nodes, "MAX_VALUES", 10_000)
    rows = [f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 10)}]" for n in range(8)]
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "\n".join(rows)
    assert text_of("yaml", _written(path, bomb)) == f"```yaml\n{bomb}\n```"
    refused("yaml", path, r"its aliases stand for more than 10,000 values \(a bomb\)", keep=("i",))
    refused("yaml", _written(path, f"{bomb}\nlist: [*i]\n"), "its aliases stand for more than 10,000", records="list")


def test_aliases_that_nest_are_refused_where_they_are_written_out(path: Path) -> None:
    chain = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 5000))
    assert len(read("yaml", _written(path, chain), keep=("a50",))) == 1
    refused("yaml", path, "its aliases nest too deeply; at most 100 levels", keep=("a4999",))


def test_values_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_nodes, "MAX_VALUES", 1000)
    assert len(documents(path, "- a\n" * 999 + "---\n" + "- a\n" * 999)) == 2
    refused("yaml", _written(path, "- a\n" * 1000), "a document has more than 1,000 keys and values")


def test_bytes_in_doubt_are_named(path: Path) -> None:
    path.write_bytes("a: Привет".encode("koi8-r"))
    assert refused("yaml", path, "its encoding is in doubt").reason == "undecodable"


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path
