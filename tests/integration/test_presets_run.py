"""Each preset is trained at toy size: the recipe as it is, but for a tiny model under the name of the large one, few and short
rows, and float32. Two train by default; ``make test-parity`` trains them all, in bfloat16 where the preset says so."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from text_recipes import WORDS, make_site, text, write_texts

from outgrow.cluster.local import run_local
from outgrow.cluster.presets_page import FOLDER, TARGETS
from outgrow.cluster.runs import claim
from outgrow.contracts import JobSpec, RunResult
from outgrow.recipes.deepspeed import extensions_folder
from outgrow.recipes.loading import load
from outgrow.recipes.schema.site import Site
from outgrow.streaming.build import build
from outgrow.torchvision import ensure_importable

ensure_importable()

SAID = {"ru": "Как вы думаете, сегодня будет хорошая погода", "en": "What do you think of the weather today"}
STEPS = 3
MODELS = ("llama-3-8b", "llama-3-70b")
SMALLER = (
    "data.sequence_length=256",
    "data.loader_workers=0",
    "batch={rows: 4, micro_rows: 1}",
    f"duration={{steps: {STEPS}}}",
    "validation={every_steps: 0, max_rows: 4}",
    "checkpoint.every_steps=2",
    "data.validation_fraction=0.2",
    "logging={every_steps: 1, trackers: []}",
)
ARCHITECTURE = (
    "model.config={hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 4, max_position_embeddings: 256, tie_word_embeddings: true}",
    "data.tokenizer.vocab_size=400",
)


@dataclass(frozen=True)
class Toys:
    """A site whose sources have the names that the presets use."""

    root: Path
    site: Site

    def train(self, name: str, workers: int, *overrides: str) -> RunResult:
        recipe = load(FOLDER / f"{name}.yaml")
        made = ARCHITECTURE if recipe.model.kind == "architecture" else ()
        recipe = load(FOLDER / f"{name}.yaml", (*SMALLER, *made, *overrides))
        card = build(recipe, self.site).card
        with claim(self.site.open_storage(), recipe, card.data_fingerprint, fresh=True, accept=False) as claimed:
            job = JobSpec(
                recipe=recipe.to_dict(), site=self.site.to_dict(), card=card, run=claimed.run, workers=workers,
                threads_per_worker=1, device="cpu", launched=time.time(),
            )  # fmt: skip
            return run_local(job, "outgrow.trainers.loop:train_worker", on_record=lambda record: None)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Toys]:
    root = tmp_path_factory.mktemp("toys")
    for name in ("texts", "russian-texts"):
        write_texts(root / name, 12)
    for name in ("dialogues", "russian-dialogues", "lima"):
        write_dialogues(root / name, "ru" if name.startswith("russian") else "en")
    for name in MODELS:
        write_model(root / name)
    keep_extensions(root / "cache")
    sources = ("texts", "russian-texts", "dialogues", "russian-dialogues", "lima", *MODELS)
    site = make_site(root, **{name: root / name for name in sources})
    tiers = [{"name": "nvme", "path": str(root / "nvme"), "reserve": "0 B"}]
    yield Toys(root, Site.model_validate(site.to_dict() | {"tiers": tiers}))


def keep_extensions(cache: Path) -> None:
    """What DeepSpeed compiles takes minutes; it is kept where the tests of ZeRO keep it."""
    kept = extensions_folder(Path("~/.cache/outgrow").expanduser())
    kept.mkdir(parents=True, exist_ok=True)
    made = extensions_folder(cache)
    made.parent.mkdir(parents=True)
    made.symlink_to(kept)


def write_dialogues(folder: Path, language: str) -> None:
    folder.mkdir()
    said = SAID[language]
    lines = [
        {"messages": [{"role": "user", "content": f"{said} {WORDS[n % 12]}?"}, {"role": "assistant", "content": said * 2}]}
        for n in range(24)
    ]
    (folder / "a.jsonl").write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))


def write_model(folder: Path) -> None:
    """A tiny Llama with a tokenizer of its own, as a folder of the hub has them."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SAID["ru"], SAID["en"], *(text(seed, 60) for seed in range(8))], bpe)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[-1])
    wrapped.save_pretrained(folder)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, vocab_size=tokenizer.get_vocab_size(), bos_token_id=0, eos_token_id=4,
    )  # fmt: skip
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)


def finished(result: RunResult) -> None:
    assert result.worker.step == STEPS
    assert 0 < result.worker.train_loss < 10
    assert result.worker.checkpoint


def test_qlora_of_a_70b(toys: Toys) -> None:
    finished(toys.train("llama70b-qlora", 1, "precision=fp32"))


def test_a_model_from_nothing(toys: Toys) -> None:
    finished(toys.train("scratch-350m", 1, "precision=fp32"))


@pytest.mark.parity
@pytest.mark.parametrize(
    ("name", "workers", "overrides"),
    [
        ("llama70b-qlora", 1, ()),
        ("llama70b-qlora", 2, ()),
        ("llama70b-lora", 2, ()),
        ("llama70b-lora", 4, ()),
        ("llama70b-full", 2, ()),
        ("llama70b-full", 2, ("optimizer.kind=adamw",)),
        ("llama70b-full-offload", 2, ()),
        ("llama70b-full-offload", 2, ("parallel.offload_optimizer=cpu",)),
        ("llama8b-continue", 1, ()),
        ("llama8b-continue", 2, ()),
        ("llama8b-continue", 4, ("parallel.shard=2",)),  # two nodes of two
        # Of Cyrillic the toy tokenizer makes a token a byte.
        ("russian-70b-lora", 1, ("data.sequence_length=512",)),
        ("russian-70b-lora", 2, ("data.sequence_length=512", "adapter.base=full")),
        ("scratch-350m", 2, ()),
        ("scratch-1b", 1, ()),
        ("sft-lima", 1, ()),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_every_preset_on_as_many_ranks_as_it_is_for(toys: Toys, name: str, workers: int, overrides: tuple[str, ...]) -> None:
    finished(toys.train(name, workers, *overrides))


def test_every_preset_is_trained_here() -> None:
    marks = test_every_preset_on_as_many_ranks_as_it_is_for.pytestmark
    cases = next(mark for mark in marks if mark.name == "parametrize").args[1]
    assert {case[0] for case in cases} == set(TARGETS)
