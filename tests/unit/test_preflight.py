"""What ``plan`` sees here before anything is built: weights, base, attention and loss, tools; without reading a weight."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from engine_cases import VOCAB, Case, born_weights
from safetensors.torch import save_file

from outgrow.contracts import Refusal
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage
from outgrow.trainers.adapters.identity import BaseIdentity, folder_identity
from outgrow.trainers.checkpoint.commit import Group, StepState
from outgrow.trainers.checkpoint.retention import Retention
from outgrow.trainers.checkpoint.saving import Checkpointer
from outgrow.trainers.preflight import obstacles

RUN = "runs/case"
LORA = {"kind": "lora", "rank": 2}


@dataclass
class Card:
    """The vocabulary of the dataset."""

    vocab_size: int = VOCAB
    eos_token_id: int = 0


def folder(path: Path, *, family: str = "llama", without: str = "", **sizes: float) -> str:
    """A folder of weights of a tiny model, whose configuration may say other sizes."""
    path.mkdir()
    weights = born_weights(Case(family=family))
    save_file({name: tensor.contiguous() for name, tensor in weights.items() if name != without}, path / "model.safetensors")
    Case(family=family, sizes=sizes).config().save_pretrained(path)
    return str(path)


def found(case: Case, *, storage: Path | None = None, run: str | None = None) -> list[Refusal]:
    site = case.site()
    if storage is not None:
        site = site.model_copy(update={"storage": str(storage)})
    return obstacles(case.recipe(), Site.model_validate(site.to_dict()), Card(), "cpu", run)


def test_nothing_is_found_where_all_is_there(tmp_path: Path) -> None:
    case = Case(base=folder(tmp_path / "base"))
    assert found(case) == []
    assert found(replace(case, adapter=LORA)) == []
    assert found(Case()) == []


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    (lacking,) = found(Case(base=folder(tmp_path / "lacking", without="model.norm.weight")))
    assert lacking.asked.startswith(f"{tmp_path}/lacking: the weights do not fit the model\nmissing: model.norm.weight [32]")
    (other,) = found(Case(base=folder(tmp_path / "other", intermediate_size=64)))
    assert "misshapen: model.layers.0.mlp.down_proj.weight is [32, 56], the model's is [32, 64]" in other.asked
    Path(tmp_path, "other/model.safetensors").unlink()
    (none,) = found(Case(base=str(tmp_path / "other")))
    assert "no weights here: neither model.safetensors nor model.safetensors.index.json" in none.asked


def save(storage: Path, step: int, base: BaseIdentity | None) -> None:
    group = Group(RUN, "a", 0, 1)
    saver = Checkpointer(Storage(str(storage)), group, {}, Retention(newest=9, best=0), patience_s=60)
    identity = base.to_dict() if base else None
    saver.save({}, StepState(step=step, loader_state={}, recipe={}, metrics={}, base=identity))
    saver.wait()
    saver.close()


def test_another_base_than_the_run_began_with_is_refused(tmp_path: Path) -> None:
    case = Case(base=folder(tmp_path / "base"), adapter=LORA)
    save(tmp_path / "s", 1, folder_identity(Path(folder(tmp_path / "before", rms_norm_eps=1.0))))
    (refused,) = found(case, storage=tmp_path / "s", run=RUN)
    assert "the adapter was trained beside another base" in refused.asked
    assert "different: config.json" in refused.asked
    assert found(case, storage=tmp_path / "s") == [], "a new run"
    save(tmp_path / "s", 2, folder_identity(tmp_path / "base"))
    assert found(case, storage=tmp_path / "s", run=RUN) == []


def test_a_damaged_checkpoint_says_nothing(tmp_path: Path) -> None:
    """The run goes on from the one before, whose base counts."""
    case = Case(base=folder(tmp_path / "base"), adapter=LORA)
    save(tmp_path / "s", 1, folder_identity(tmp_path / "base"))
    save(tmp_path / "s", 2, folder_identity(Path(folder(tmp_path / "before", rms_norm_eps=1.0))))
    (pieces,) = (tmp_path / "s" / RUN / "checkpoints/step-00000002").glob("pieces*")
    pieces.write_bytes(bytes(len(pieces.read_bytes())))
    assert found(case, storage=tmp_path / "s", run=RUN) == []


def test_a_full_run_that_has_a_checkpoint_needs_no_weights_of_the_folder(tmp_path: Path) -> None:
    case = Case(base=folder(tmp_path / "base"))
    (tmp_path / "base/model.safetensors").unlink()
    assert len(found(case, storage=tmp_path / "s", run=RUN)) == 1
    save(tmp_path / "s", 1, None)
    assert found(case, storage=tmp_path / "s", run=RUN) == []
    assert len(found(replace(case, adapter=LORA), storage=tmp_path / "s", run=RUN)) >= 1


def test_attention_and_loss_that_the_model_cannot_have_are_refused() -> None:
    (attention,) = found(Case(family="gemma2", settings={"attention": "sdpa"}))
    assert attention.asked == "attention: attention is sdpa: it would leave out the soft cap of the scores"
    assert attention.nearest.startswith("what can be had here: auto, eager")
    (loss,) = found(Case(family="cohere", settings={"cross_entropy": {"kind": "chunked"}}))
    assert "chunked is not known to be right for cohere" in loss.asked


def test_tools_that_offload_to_a_disk_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nvme = Case(engine="zero", settings={"parallel": {"kind": "zero", "offload_optimizer": "nvme"}}, precision="fp32")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert any("g++ (package g++), ninja (package ninja-build)" in refusal.asked for refusal in found(nvme))
    assert found(Case(precision="fp32")) == []
