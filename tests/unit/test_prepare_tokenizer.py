"""What a recipe adds to its tokenizer: tags, tokens of templates, the stored template; in every file, for transformers too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from slow_render import KINDS, Setting, chat_stream, make_tokenizer
from text_recipes import make_recipe, make_site, text_stream

from outgrow.contracts import DatasetCard
from outgrow.errors import DataError
from outgrow.streaming.render import prepare_tokenizer, template_identity, template_text
from outgrow.streaming.render.named_templates import TEMPLATES
from outgrow.streaming.render.preparing import check_model_tokenizer
from outgrow.streaming.sources.document import Dialogue, Document
from outgrow.streaming.tokenizer import TextTokenizer

MESSAGES = ({"role": "user", "content": "Hello there."}, {"role": "assistant", "content": "Good day!"})
OWN = {"kind": "tokenizer"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bare")
    return {kind: make_tokenizer(kind, root / kind) for kind in KINDS}


def copy(source: Path, to: Path) -> Path:
    return Path(shutil.copytree(source, to / "tokenizer"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def change(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_transformers_applies_the_stored_template_as_we_do(bare: dict[str, Path], tmp_path: Path, kind: str, name: str) -> None:
    setting = Setting(copy(bare[kind], tmp_path), chat_stream(name, tag="<TAG>"), {**text_stream("prose"), "tag": "<PROSE>"})
    (made,) = setting.renderer.encode([Document(content=Dialogue(messages=MESSAGES), source="x")])
    assert setting.theirs.apply_chat_template(list(MESSAGES), return_dict=False) == made.tokens.tolist()[1:]  # type: ignore[union-attr]
    before, after = TextTokenizer(bare[kind]), setting.tokenizer
    assert after.vocab_size > before.vocab_size and after.eos_token_id == before.eos_token_id
    assert len(setting.theirs) == after.vocab_size
    for token in ("<TAG>", "<PROSE>"):
        assert setting.theirs.convert_tokens_to_ids(token) == after.token_id(token)
        assert token in setting.theirs.all_special_tokens
        assert setting.theirs.decode([after.token_id(token)], skip_special_tokens=True) == ""
    for old, new in zip(before.encode(["Plain text <TAG>."]), after.encode(["Plain text <TAG>."]), strict=True):
        assert old.tolist() == new.tolist()


def test_every_file_that_lists_tokens_is_kept_right(bare: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(bare["first"], tmp_path)
    (folder / "added_tokens.json").write_text("{}")
    change(folder / "tokenizer_config.json", chat_template="old", additional_special_tokens=["<unk>"])
    setting = Setting(folder, chat_stream("chatml", tag="<TAG>"))
    added = {token: setting.tokenizer.token_id(token) for token in ("<TAG>", "<|im_start|>", "<|im_end|>")}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert {int(number): entry["content"] for number, entry in config["added_tokens_decoder"].items()}.items() >= {
        (number, token) for token, number in added.items()
    }
    assert config["additional_special_tokens"] == ["<unk>", *added] and "chat_template" not in config
    assert json.loads((folder / "special_tokens_map.json").read_text())["additional_special_tokens"] == list(added)
    assert json.loads((folder / "added_tokens.json").read_text()) == added
    assert (folder / "chat_template.jinja").read_text() == TEMPLATES["chatml"]
    once = files(folder)
    prepare_tokenizer(folder, setting.recipe.data, setting.site)
    assert files(folder) == once


def test_a_tokenizer_that_lacks_nothing_stays_as_it_is(bare: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(bare["bytes"], tmp_path)
    before = files(folder)
    site = make_site(tmp_path)
    prepare_tokenizer(folder, make_recipe(text_stream()).data, site)
    assert files(folder) == before
    change(folder / "tokenizer_config.json", chat_template="{{ messages[0].content }}")
    before = files(folder)
    prepare_tokenizer(folder, make_recipe(chat_stream(OWN)).data, site)
    assert files(folder) == before


def test_a_token_of_the_vocabulary_becomes_special_with_its_id(bare: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(bare["bytes"], tmp_path)
    form = json.loads((folder / "tokenizer.json").read_text())
    token, number = next(
        (token, number) for token, number in form["model"]["vocab"].items() if len(token) > 3 and token.isalpha()
    )
    (folder / "chat_template.jinja").write_text(
        "{#- special tokens: " + token + " -#}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    setting = Setting(folder, chat_stream(OWN))
    assert (setting.tokenizer.token_id(token), setting.tokenizer.vocab_size) == (
        number,
        TextTokenizer(bare["bytes"]).vocab_size,
    )
    (made,) = setting.tokenizer.encode([f"x{token}x"])
    assert number not in made and setting.tokenizer.decode(made[:-1]) == f"x{token}x"


def test_the_first_stream_with_dialogues_stores_its_template(bare: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(bare["bytes"], tmp_path)
    (folder / "chat_template.jinja").write_text("own {{ messages[0].content }}")
    streams = [text_stream(), chat_stream("saiga"), chat_stream(OWN, name="b"), chat_stream("chatml", name="c")]
    setting = Setting(folder, *streams)
    texts = [template_text(stream, setting.site, folder) for stream in setting.recipe.data.streams]
    assert texts == [None, TEMPLATES["saiga"], "own {{ messages[0].content }}", TEMPLATES["chatml"]]
    assert setting.theirs.chat_template == TEMPLATES["saiga"]
    other = copy(bare["bytes"], tmp_path / "other")
    (other / "chat_template.jinja").write_text("own")
    assert Setting(other, *streams[2:], text_stream()).theirs.chat_template == "own"


def test_streams_of_ones_own_may_have_dialogues_or_not(bare: dict[str, Path], tmp_path: Path) -> None:
    own = {"name": "own", "source": {"kind": "custom", "factory": "m:f"}}
    folder, site = copy(bare["bytes"], tmp_path), make_site(tmp_path)
    recipe = make_recipe(own)
    prepare_tokenizer(folder, recipe.data, site)
    assert template_text(recipe.data.streams[0], site, folder) is None
    recipe = make_recipe({**own, "chat": {"template": {"kind": "named", "name": "chatml"}}})
    prepare_tokenizer(folder, recipe.data, site)
    assert template_text(recipe.data.streams[0], site, folder) == TEMPLATES["chatml"]
    assert TextTokenizer(folder).token_id("<|im_end|>") is not None


def test_the_identity_is_what_of_templates_decides_the_tokens(bare: dict[str, Path], tmp_path: Path) -> None:
    folder = copy(bare["first"], tmp_path)
    template = tmp_path / "t.jinja"
    template.write_text("A")
    site = make_site(tmp_path, t=template, tok=folder)
    given = {"kind": "folder", "path": "tok"}
    streams = [text_stream(), chat_stream({"kind": "file", "path": "t"})]

    def identity(*chosen: dict[str, Any], **data: Any) -> Any:
        return template_identity(make_recipe(*chosen, **data).data, site)

    assert identity(text_stream()) == identity(text_stream(), tokenizer=given) == {}
    assert identity(*streams)["templates"] == {"chat": "A"}
    before = identity(*streams, tokenizer=given)
    template.write_text("B")
    changed = identity(*streams, tokenizer=given)
    change(folder / "tokenizer_config.json", bos_token=None)
    assert before != changed != identity(*streams, tokenizer=given)
    (folder / "chat_template.jinja").write_text("own")
    assert identity(chat_stream(OWN), tokenizer=given)["templates"] == {"chat": "own"}


def test_a_models_tokenizer_is_compared_with_what_the_recipe_adds(bare: dict[str, Path], tmp_path: Path) -> None:
    setting = Setting(copy(bare["bytes"], tmp_path), chat_stream("chatml", tag="<TAG>"))
    card = DatasetCard(
        store="datasets/a",
        store_fingerprint="a",
        tokenizer_fingerprint=setting.tokenizer.fingerprint,
        vocab_size=setting.tokenizer.vocab_size,
        eos_token_id=setting.tokenizer.eos_token_id,
        bytes=1,
        indexes=(),
    )
    before = files(bare["bytes"])
    check_model_tokenizer(card, bare["bytes"], setting.recipe.data, setting.site)
    check_model_tokenizer(card, setting.folder, setting.recipe.data, setting.site)
    assert files(bare["bytes"]) == before
    with pytest.raises(DataError, match="does not match the dataset"):
        check_model_tokenizer(card, bare["bytes"], make_recipe(text_stream()).data, setting.site)
    with pytest.raises(DataError, match="does not match the dataset"):
        check_model_tokenizer(card, bare["first"], setting.recipe.data, setting.site)
