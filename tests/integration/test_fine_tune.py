"""A fine-tune as a user does it, command by command: a base, an adapter beside it in 4 bits on two ranks, a power cut, the same
command again, the adapter and the merged model out, and both read by the libraries that others use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import RECIPE, Place, tiny_place

from outgrow.torchvision import ensure_importable

ensure_importable()

BASE = RECIPE.replace("name: tiny", "name: base").replace("num_hidden_layers: 2", "num_hidden_layers: 3")
TUNED = """
schema: 1
run: {name: tuned, seed: 5}
model: {kind: folder, path: exported}
adapter: {kind: lora, rank: 4, alpha: 8, base: nf4}
data:
  sequence_length: 32
  tokenizer: {kind: folder, path: exported}
  streams: [{name: words, source: {kind: text, path: words}}]
  validation_fraction: 0.1
  loader_workers: 0
batch: {rows: 5}
duration: {steps: 24}
optimizer: {learning_rate: 0.01}
schedule: {kind: custom, factory: "slow_schedule:constant", options: {seconds: 0.1}}
precision: fp32
validation: {every_steps: 20, max_rows: 8}
checkpoint: {every_steps: 5}
logging: {every_steps: 1}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A place where a base was trained and exported to ``exported``."""
    with tiny_place(tmp_path_factory.mktemp("tune")) as made:
        (made.folder / "base.yaml").write_text(BASE)
        (made.folder / "tuned.yaml").write_text(TUNED)
        made.run("train", "base.yaml", "duration.steps=12", "--workers", "1")
        made.run("export", "base", "exported", "--dtype", "fp32")
        yield made


@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_an_adapter_beside_a_base_in_4_bits_survives_a_power_cut_and_leaves_as_peft_reads_it(place: Place) -> None:
    said = place.run("plan", "tuned.yaml")
    assert "this run can start" in said
    command = place.start("train", "tuned.yaml")
    place.wait_for_step(8, command)
    place.kill_everything()
    command.wait()
    assert "resumed on 2 rank" in place.run("train", "tuned.yaml")
    files = (place.folder / "storage").glob("runs/tuned-*/checkpoints/*/*.safetensors")
    checkpoints = sum(file.stat().st_size for file in files)
    base = (place.folder / "exported" / "model.safetensors").stat().st_size
    assert 0 < checkpoints / 3 < base, "a checkpoint holds the adapter alone"

    place.run("export", "tuned", "adapter")
    place.run("export", "tuned", "merged", "--merged", "--dtype", "fp32")
    by_peft, by_merged = logits_of_adapter(place.folder), logits(place.folder / "merged")
    assert torch.allclose(by_peft, by_merged, atol=1e-5)
    assert not torch.allclose(by_merged, logits(place.folder / "exported"), atol=1e-3), "nothing was learned"
    assert place.run("generate", "merged", "the", "--max-new-tokens", "4")


@pytest.mark.cluster
def test_what_cannot_work_is_refused_before_anything_is_read(place: Place) -> None:
    command = place.start("plan", "tuned.yaml", "run.name=exact", "precision=fp64")
    assert command.wait(60) != 0
    assert "adapter.base nf4 with precision fp64" in place.log() and "precision=bf16" in place.log()
    command = place.start("plan", "tuned.yaml", "adapter.targets=[q_projection]")
    assert command.wait(60) != 0
    assert "q_projection" in place.log() and "q_proj" in place.log().replace("q_projection", "")


@pytest.mark.parity
@pytest.mark.timeout(900)
def test_a_run_goes_on_with_another_engine(place: Place) -> None:
    """FSDP2, then ZeRO-3 with offload, then one rank alone: by the same command with another ``parallel``."""
    full = ["tuned.yaml", "run.name=moved", "adapter=none"]
    place.run("train", *full, "duration.steps=6")
    zero = "parallel={kind: zero, stage: 3, offload_optimizer: cpu, offload_parameters: cpu}"
    assert "resumed on 2 rank" in place.run("train", *full, "duration.steps=12", zero, timeout_s=400)
    assert "resumed on 1 rank" in place.run("train", *full, "duration.steps=18", "--workers", "1")
    folder = next((place.folder / "storage" / "runs").glob("moved-*"))
    engines = [
        record.detail["layout"]["engine"] for record in place.records() if record.kind == "start" and "layout" in record.detail
    ]
    assert engines[-3:] == ["fsdp2", "zero", "plain"], (folder, engines)


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.arange(5, 25)[None]).logits)


def logits_of_adapter(folder: Path) -> torch.Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.arange(5, 25)[None]).logits)
