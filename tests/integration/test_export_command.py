"""From a trained run to text by the commands ``export`` and ``generate``, on a real dataset and checkpoint; ``model check``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from text_recipes import make_recipe, make_site, text_stream, write_texts
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM, PretrainedConfig

from outgrow.cli import main
from outgrow.cluster.local import run_local
from outgrow.cluster.runs import claim
from outgrow.contracts import JobSpec
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.site import Site
from outgrow.streaming.build import build
from outgrow.trainers.checkpoint.catalog import newest
from outgrow.trainers.checkpoint.reader import open_checkpoint
from outgrow.trainers.models import probes
from outgrow.trainers.models.build import config_for
from outgrow.trainers.models.checked import checked
from outgrow.trainers.models.probes import HeldTensors, filled
from outgrow.trainers.regions import Region

STEPS = 3
MODEL = {
    "kind": "architecture",
    "family": "llama",
    "config": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
}


def recipe() -> Recipe:
    plain = make_recipe(text_stream(), loader_workers=0).to_dict()
    return Recipe.model_validate(
        {
            **plain,
            "model": MODEL,
            "precision": "fp32",
            "duration": {"steps": STEPS},
            "checkpoint": {"every_steps": 2, "keep_newest": 9},
        }
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A site with one finished run, named ``test``; its sources are gone."""
    root = tmp_path_factory.mktemp("site")
    made = make_site(root, prose=write_texts(root / "prose", 12))
    (root / "site.yaml").write_text(f"schema: 1\nstorage: {made.storage}\ncache: {made.cache}\n")
    card = build(recipe(), made).card
    with claim(made.open_storage(), recipe(), card.data_fingerprint, fresh=False, accept=False) as claimed:
        job = JobSpec(
            recipe=recipe().to_dict(),
            site=made.to_dict(),
            card=card,
            run=claimed.run,
            workers=1,
            threads_per_worker=1,
            device="cpu",
            launched=time.time(),
        )
        run_local(job, "outgrow.trainers.loop:train_worker", on_record=lambda record: None)
    shutil.rmtree(root / "prose")
    return made


def command(site: Site, *words: str) -> int:
    """The exit code of ``outgrow WORDS --site ...``."""
    with pytest.raises(SystemExit) as ended:
        main([*words, "--site", str(Path(site.storage).parent / "site.yaml")])
    return int(ended.value.code or 0)


def run_folder(site: Site) -> str:
    (folder,) = site.open_storage().names("runs")
    return f"runs/{folder}"


def test_an_exported_run_computes_what_was_trained_and_writes_text(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert command(site, "export", "test", str(out)) == 0
    assert f"{run_folder(site).removeprefix('runs/')} at step {STEPS}" in capsys.readouterr().out

    storage = site.open_storage()
    ref = newest(storage, run_folder(site))
    assert ref is not None
    reader = open_checkpoint(storage, ref)
    names = [name.removeprefix("model/") for name in reader.names() if name.startswith("model/")]
    whole = {name: reader.read(f"model/{name}", _all_of(reader.shape(f"model/{name}"))) for name in names}
    card = build(recipe(), site).card
    trained = filled(config_for(recipe(), site, card), HeldTensors(whole)).train(False)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, trained(input_ids=ids, use_cache=False).logits)

    with pytest.raises(SystemExit) as ended:
        main(["generate", str(out), "alpha", "--max-new-tokens", "8", "--seed", "1"])
    assert not ended.value.code
    written = capsys.readouterr().out
    assert written.startswith("alpha") and len(written) > len("alpha\n")


def test_an_older_step_in_another_dtype(site: Site, tmp_path: Path) -> None:
    assert command(site, "export", run_folder(site), str(tmp_path / "out"), "--step", "2", "--dtype", "bf16") == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("test", "OUT", "--step", "7"), "has no checkpoint of step 7; committed steps: 2, 3"),
        (("tset", "OUT"), "no run 'tset'"),
        (("test", "."), "there is something else here already"),
    ],
)
def test_what_cannot_be_exported_is_one_message_and_exit_code_2(
    words: tuple[str, ...],
    message: str,
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(site, "export", *words) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_tokenizer_is_not_exported(site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = site.open_storage()
    (store,) = (name for name in storage.names("datasets") if storage.exists(f"datasets/{name}/tokenizer"))
    path = Path(storage.path(f"datasets/{store}/tokenizer/tokenizer.json"))
    data = path.read_bytes()
    try:
        path.write_bytes(data + b" ")
        assert command(site, "export", "test", str(tmp_path / "out")) == 1
    finally:
        path.write_bytes(data)
    assert "differ from their digest" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_family_that_passes_its_check_is_remembered(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(site, "model", "check", "qwen2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:-1]] == [[name, "passed"] for name in probes.PROBES]
    assert lines[-1] == "qwen2 has passed and may be trained on this machine"
    assert checked(Path(site.cache)) == ["qwen2"]


def test_a_family_that_fails_a_probe_stays_refused(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(config: PretrainedConfig, folder: Path) -> str:
        raise IndexError("list index out of range")

    some: Mapping[str, object] = {"load": probes.load, "export": broken}
    monkeypatch.setattr(probes, "PROBES", some)
    assert command(site, "model", "check", "phi3") == 2
    said = capsys.readouterr()
    assert "export          FAILED  IndexError: list index out of range" in said.out
    assert "phi3 failed 1 of the probes and stays refused" in said.err
    assert "phi3" not in checked(Path(site.cache))


def test_families_that_cannot_be_checked_have_a_message(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(site, "model", "check", "gpt2") == 2
    assert "resid_pdrop is 0.1; only 0.0 is supported" in capsys.readouterr().err
    assert command(site, "model", "check", FAMILIES[0] + "a") == 2
    assert "did you mean llama?" in capsys.readouterr().err


def _all_of(shape: tuple[int, ...]) -> Region:
    return Region.whole(shape)
