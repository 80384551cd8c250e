"""Runs that train an adapter beside a folder: what they save, go on from and refuse, and what comes out of them, read by peft
and transformers themselves."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from text_recipes import make_recipe, make_site, text_stream, write_texts
from tiny_models import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from outgrow.cli import main
from outgrow.cluster.local import run_local
from outgrow.cluster.runs import claim
from outgrow.contracts import DatasetCard, JobSpec, RunRef
from outgrow.errors import ModelError
from outgrow.monitoring.events import read_events
from outgrow.monitoring.recording.recorder import Recorder
from outgrow.recipes.layout import resolve
from outgrow.recipes.schema import Recipe
from outgrow.streaming.build import build
from outgrow.trainers.bring_up import build_model, start_engine
from outgrow.trainers.checkpoint.catalog import list_checkpoints
from outgrow.trainers.engines import Engine
from outgrow.trainers.models.probes import lively

STEPS = 4
IDS = torch.arange(20)[None]
TRAIN_WORKER = "outgrow.trainers.loop:train_worker"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


class Place:
    """A site with a dataset, and bases of its tokens: ``base``, and ``tied`` whose head is its embedding."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.site = make_site(root, prose=write_texts(root / "prose", 12), base=root / "base", tied=root / "tied")
        sources = "".join(f"  {name}: {root / name}\n" for name in ("base", "tied"))
        text = f"schema: 1\nstorage: {self.site.storage}\ncache: {self.site.cache}\nsources:\n{sources}"
        (root / "site.yaml").write_text(text)
        self.card: DatasetCard = build(recipe("none", {"kind": "none"}), self.site).card
        self.make_base("base")
        self.make_base("tied", tie_word_embeddings=True)

    def make_base(self, name: str, scale: float = 1.0, **keys: Any) -> None:
        model = lively(self.config(**keys))
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(scale)
        model.save_pretrained(self.root / name)

    def config(self, **keys: Any) -> PretrainedConfig:
        tokens = {"vocab_size": self.card.vocab_size, "eos_token_id": self.card.eos_token_id}
        return AutoConfig.for_model("llama", **SIZES, **tokens, bos_token_id=None, pad_token_id=None, **keys)

    def job(self, name: str, adapter: dict[str, Any], workers: int = 1, **keys: Any) -> JobSpec:
        chosen = recipe(name, adapter, **keys)
        with claim(self.site.open_storage(), chosen, self.card.data_fingerprint, fresh=False, accept=False) as claimed:
            run = claimed.run
        return JobSpec(
            recipe=chosen.to_dict(),
            site=self.site.to_dict(),
            card=self.card,
            run=run,
            workers=workers,
            threads_per_worker=1,
            device="cpu",
            launched=time.time(),
        )

    def train(self, name: str, adapter: dict[str, Any], workers: int = 1, **keys: Any) -> JobSpec:
        job = self.job(name, adapter, workers, **keys)
        run_local(job, TRAIN_WORKER, on_record=lambda record: None)
        return job

    def engine(self, job: JobSpec) -> Engine:
        """The run's newest checkpoint beside its base, as a worker starts with it."""
        chosen, storage = Recipe.model_validate(job.recipe), self.site.open_storage()
        recorder = Recorder(None, rank=0, launched=job.launched, before=None, stall_after_s=60)
        layout, model = resolve(chosen, 1, 1), build_model(job, chosen)
        started = start_engine(job, chosen, layout, storage, torch.device("cpu"), model, recorder)
        assert started.progress.step == STEPS
        return started.engine

    def export(self, *words: str) -> int:
        """The exit code of ``outgrow export WORDS``."""
        with pytest.raises(SystemExit) as ended:
            main(["export", *words, "--site", str(self.root / "site.yaml")])
        return int(ended.value.code or 0)

    def losses(self, run: RunRef) -> list[float | None]:
        return [r.loss for r in read_events(self.site.open_storage(), run.folder) if r.kind == "step"]


def recipe(name: str, adapter: dict[str, Any], **keys: Any) -> Recipe:
    return Recipe.model_validate(
        {
            **make_recipe(text_stream(), loader_workers=0).to_dict(),
            "run": {"name": name, "seed": 3},
            "model": {"kind": "folder", "path": "base"},
            "adapter": adapter,
            "precision": "fp32",
            "optimizer": {"kind": "adamw", "learning_rate": 0.02},
            "schedule": {"kind": "constant", "warmup_steps": 1},
            "duration": {"steps": STEPS},
            "checkpoint": {"every_steps": 2, "keep_newest": 9},
            "logging": {"every_steps": 1},
            **keys,
        }
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    assert "llama" in FAMILIES
    return Place(tmp_path_factory.mktemp("place"))


def engine_logits(engine: Engine) -> torch.Tensor:
    return engine.logits(IDS, torch.zeros_like(IDS), IDS)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        last: torch.Tensor = model.eval()(input_ids=IDS, use_cache=False).logits[:, -1]
    return last


def by_peft(base: Path, folder: Path) -> torch.Tensor:
    from peft import PeftModel

    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        ("lora", {"rank": 4, "alpha": 6.5}),
        ("rslora", {"scaling": "rslora", "targets": ["q_proj", "layers.1.mlp.*"], "fully_trained": ["*norm", "lm_head"]}),
        ("dora", {"dora": True, "fully_trained": ["embed_tokens", "layers.0"]}),
    ],
)
def test_what_comes_out_computes_what_was_trained(name: str, adapter: dict[str, Any], place: Place, tmp_path: Path) -> None:
    job = place.train(name, {"kind": "lora", **adapter})
    trained = engine_logits(place.engine(job))
    assert place.export(name, str(tmp_path / "adapter")) == 0
    assert place.export(name, str(tmp_path / "merged"), "--merged") == 0
    assert difference(by_peft(place.root / "base", tmp_path / "adapter"), trained) < 1e-5
    assert difference(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), trained) < 1e-5
    assert difference(logits(AutoModelForCausalLM.from_pretrained(place.root / "base")), trained) > 0.05
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    own = {"adapter_config.json", "adapter_model.safetensors", "outgrow-base.json", "outgrow-export.json"}
    assert own <= files and "tokenizer.json" in files and "model.safetensors" not in files
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert str(place.root) not in (tmp_path / "adapter" / "adapter_config.json").read_text()
    if name == "lora":
        assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert place.export(name, str(tmp_path / "adapter")) == 0, "the same again is verified"
    assert place.export(name, str(tmp_path / "adapter"), "--merged") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "merged"}


def test_a_base_in_4_bits_is_merged_as_it_was_or_as_it_was_computed_with(place: Place, tmp_path: Path) -> None:
    job = place.train("qlora", {"kind": "lora", "base": "nf4", "dora": True})
    trained = engine_logits(place.engine(job))
    assert place.export("qlora", str(tmp_path / "adapter")) == 0
    assert place.export("qlora", str(tmp_path / "original"), "--merged") == 0
    assert place.export("qlora", str(tmp_path / "computed"), "--merged", "--merge-into", "4-bit") == 0
    original = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "original"))
    computed = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "computed"))
    assert difference(computed, trained) < 1e-5
    assert difference(original, by_peft(place.root / "base", tmp_path / "adapter")) < 1e-5
    assert difference(original, computed) > 0.01
    assert place.export("qlora", str(tmp_path / "original"), "--merged", "--merge-into", "4-bit") == 2


SMALL = {"kind": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def straight(place: Place) -> RunRef:
    """A run of one rank from its first step to its last."""
    return place.train("straight", SMALL).run


def test_a_run_goes_on_from_a_small_checkpoint_bit_equal(place: Place, straight: RunRef) -> None:
    halted = place.train("halted", SMALL, duration={"steps": 2})
    assert place.train("halted", SMALL).run == halted.run
    assert place.losses(halted.run) == place.losses(straight)
    refs = list_checkpoints(place.site.open_storage(), straight.folder)
    trained = 2 * 2 * ((32 + 32) + (32 + 16)) * 4  # rank x layers x (in + out) x bytes
    weights = (place.root / "base" / "model.safetensors").stat().st_size
    assert 3 * trained < refs[0].bytes < 3 * trained + 20_000 < weights


@pytest.mark.parity
def test_a_run_goes_on_on_fewer_ranks(place: Place, straight: RunRef) -> None:
    halted = place.train("fewer", SMALL, workers=2, duration={"steps": 2})
    place.train("fewer", SMALL)
    assert place.losses(halted.run) == pytest.approx(place.losses(straight), abs=1e-5)


def test_another_base_is_refused_by_name_and_nothing_is_exported(
    place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place.train("moved", {"kind": "lora"}, duration={"steps": 2})
    place.make_base("base", scale=1.01)
    try:
        with pytest.raises(ModelError, match="trained beside another base") as raised:
            place.train("moved", {"kind": "lora"})
        assert "different: model.safetensors" in str(raised.value)
        for words in ((), ("--merged",)):
            assert place.export("moved", str(tmp_path / "out"), *words) == 2
            assert "trained beside another base" in capsys.readouterr().err
    finally:
        place.make_base("base")
    place.train("moved", {"kind": "lora"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "keys", "words", "message"),
    [
        ("full", {"adapter": {"kind": "none"}}, ("--merged",), "there is no adapter to merge"),
        ("born", {"model": {"kind": "architecture", "family": "llama", "config": SIZES}}, (), "made from nothing"),
        ("tied", {"model": {"kind": "folder", "path": "tied"}}, (), "one matrix for embedding and head"),
        ("tied", {"model": {"kind": "folder", "path": "tied"}}, ("--merged", "--merge-into", "4-bit"), "not in 4 bits"),
        ("tied", {"model": {"kind": "folder", "path": "tied"}}, ("--merge-into", "4-bit"), "goes with --merged"),
    ],
)
def test_what_cannot_be_exported_is_refused_with_what_can(
    name: str,
    keys: dict[str, Any],
    words: tuple[str, ...],
    message: str,
    place: Place,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter = {"kind": "lora", "fully_trained": ["embed_tokens"]}
    job = place.train(name, keys.pop("adapter", adapter), duration={"steps": 1}, **keys)
    assert place.export(name, str(tmp_path / "out"), *words) == 2
    said = capsys.readouterr().err
    assert message in said and (name == "full" or "--merge" in said)
    assert list(tmp_path.iterdir()) == []
    if name != "full" and not words:
        assert place.export(job.run.folder, str(tmp_path / "out"), "--merged") == 0
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings == (name == "tied")
