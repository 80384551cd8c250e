"""Linear layers in 4 bits: against bitsandbytes' own, against what they stand for, and kept on a disk that may lie."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from torch import nn

from outgrow.errors import IntegrityError, ModelError, OutgrowError, PlanError, TrainingError
from outgrow.recipes.schema.site import Site
from outgrow.storage import tree_digests
from outgrow.trainers.adapters import nf4
from outgrow.trainers.engines.materialise import materialise
from outgrow.trainers.models import quantised, quantising
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.probes import filled, lively
from outgrow.trainers.models.quantised import QuantisedWeights
from outgrow.trainers.models.quantising import quantised_weights
from outgrow.trainers.models.tiny import tiny_config
from outgrow.trainers.models.weights import FolderWeights
from outgrow.trainers.regions import Region, fill

import bitsandbytes as bnb  # isort: skip  (after outgrow has made torchvision importable)

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
SHAPES = ((56, 32), (96, 128), (64, 100), (33, 64), (128, 1000))


def layer_of(weight: torch.Tensor, bias: bool = True) -> nf4.Nf4Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, dtype=weight.dtype)
    layer = nf4.Nf4Linear(linear, weight.dtype)
    packed, scales = nf4.quantise(weight, weight.dtype)
    layer.weight = nn.Parameter(packed, requires_grad=False)
    layer.quant_state = nf4.quant_state(nf4.quantise_scales(scales), tuple(weight.shape), weight.dtype, CPU)  # type: ignore[arg-type]
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_is_packed_as_bitsandbytes_packs_it(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    layer = layer_of(weight)
    # As one row, which its kernel for AVX-512 makes right numbers of at any width.
    row = weight.reshape(1, -1)
    theirs, state = bnb.functional.quantize_4bit(row, compress_statistics=True, quant_type="nf4", quant_storage=dtype)
    assert torch.equal(layer.weight.view(torch.uint8), theirs.view(torch.uint8))
    assert layer.weight.shape == nf4.packed_shape(shape, dtype)
    assert (len(layer.quant_state.absmax), len(layer.quant_state.state2.absmax)) == nf4.scale_counts(shape)
    numbers = bnb.functional.dequantize_4bit(theirs, state).view(shape)
    torch.testing.assert_close(layer.dequantize(), numbers, rtol=0, atol=2e-6)


def test_numbers_are_those_of_the_code_and_the_scale_of_their_block() -> None:
    """By hand: a CPU with AVX-512 has given rows of 32 the scales of others."""
    weight = torch.randn(48, 32)
    packed, scales = nf4.quantise(weight, torch.float32)
    pairs = packed.view(torch.uint8).view(-1).long()
    codes = bnb.functional.get_4bit_type("nf4", device="cpu")[torch.stack([pairs >> 4, pairs & 15], dim=1).view(-1)]
    state = nf4.quantise_scales(scales)
    by_block = nf4.nested_code()[state.codes.long()] * state.nested + state.offset
    expected = (codes * by_block.repeat_interleave(nf4.BLOCK)).view(48, 32)
    layer = layer_of(weight, bias=False)
    torch.testing.assert_close(layer.dequantize(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(layer(torch.eye(32)), expected.t(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_are_those_of_the_numbers_it_stands_for(
    shape: tuple[int, int], dtype: torch.dtype, training: bool
) -> None:
    layer = layer_of(torch.randn(shape).to(dtype)).train(training)
    x = torch.randn(2, 5, shape[1], dtype=dtype, requires_grad=True)
    y, expected = layer(x), nn.functional.linear(x, layer.dequantize(), layer.bias)
    gradient = torch.randn_like(y)
    assert torch.equal(y, expected)
    assert torch.equal(*(torch.autograd.grad(out, x, gradient)[0] for out in (y, expected)))
    before = layer.weight.clone()
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
    assert torch.equal(before.view(torch.uint8), layer.weight.view(torch.uint8)), "the layer repacked its weight"


def test_a_checkpointed_layer_computes_the_same_again() -> None:
    layer = layer_of(torch.randn(64, 64))
    x = torch.randn(3, 64, requires_grad=True)
    again = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (layer(x), again)))


@pytest.mark.parametrize("width", [32, 64, 96, 100])
def test_parts_of_whole_blocks_are_packed_as_the_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "_PART", 500)
    weight = torch.randn(84, width)
    whole, scales = nf4.quantise(weight, torch.float32)
    parts = [nf4.quantise(weight[region.slices], torch.float32) for region in quantising._block_parts((84, width))]
    assert len(parts) > 2
    assert torch.equal(torch.cat([packed for packed, _ in parts]).view(torch.uint8), whole.view(torch.uint8))
    assert torch.equal(torch.cat([part for _, part in parts]), scales)


# --- in a model -------------------------------------------------------------------------------------------------------


def in_4_bits(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model on meta whose linear layers within blocks are in 4 bits."""
    model = meta_model(tiny_config(family), "fp32")
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    nf4.swap_linears(model, names, dtype)
    return model


def site_at(folder: Path, **more: Any) -> Site:
    return Site.model_validate({"schema": 1, "cache": str(folder), **more})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    lively(tiny_config("llama")).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_computes_as_one_of_the_dequantised_numbers(family: str, tmp_path: Path) -> None:
    config = tiny_config(family)
    lively(config).save_pretrained(tmp_path / "base")
    folder = FolderWeights(tmp_path / "base")
    model = in_4_bits(family)
    source = quantised_weights(folder, model, site_at(tmp_path / "cache"), CPU)
    materialise(model, CPU)
    for name, parameter in model.named_parameters():
        fill(parameter.detach(), name, source)
    nf4.attach_quant_states(model, source, CPU)
    twin = filled(config, folder)
    for name, layer in nf4.quantised_layers(model):
        weight = twin.get_parameter(f"{name}.weight")
        assert torch.equal(source.dequantised(f"{name}.weight", whole(weight)), layer.dequantize())
        part = Region((3, 2), (5, 7))
        assert torch.equal(source.dequantised(f"{name}.weight", part), layer.dequantize()[part.slices])
        with torch.no_grad():
            weight.copy_(layer.dequantize())
    ids = torch.arange(20)[None]
    assert torch.equal(model(input_ids=ids).logits, twin(input_ids=ids).logits)


def whole(tensor: torch.Tensor) -> Region:
    return Region.whole(tensor.shape)


def test_what_cannot_be_kept_in_4_bits_is_refused_by_name() -> None:
    model = meta_model(tiny_config("llama"), "fp32")
    name = "model.layers.0.mlp.up_proj"
    with pytest.raises(ModelError, match="a layer of kind Embedding; allowed: linear layers"):
        nf4.swap_linears(model, ["model.embed_tokens"], torch.float32)
    with pytest.raises(ModelError, match=r"not in torch\.float64"):
        nf4.swap_linears(model, [name], torch.float64)
    with pytest.raises(ModelError, match="no linear layer of the blocks is frozen"):
        nf4.swap_linears(model, [], torch.float32)
    for rows, columns in ((3, 5), (3, 2)):
        model.set_submodule(name, nn.Linear(columns, rows, device="meta"))
        with pytest.raises(ModelError, match=f"a matrix of {rows} x {columns}: its half bytes fill no whole number"):
            nf4.swap_linears(model, [name], torch.float32)
    assert not list(nf4.quantised_layers(model))
    model.model.layers[1].mlp.experts = nn.Parameter(torch.empty(4, 8, 8, device="meta"))
    with pytest.raises(ModelError, match=r"llama keeps matrices outside of linear layers.*model\.layers\.1\.mlp\.experts"):
        nf4.swap_linears(model, ["model.layers.0.mlp.down_proj"], torch.float32)


# --- kept on a disk ---------------------------------------------------------------------------------------------------


def artefact(cache: Path) -> Path:
    (folder,) = (path for path in (cache / "quantised").iterdir() if not path.name.startswith("."))
    return folder


def values(source: QuantisedWeights, model: nn.Module) -> dict[str, bytes]:
    return {
        name: source.read(name, whole(parameter)).contiguous().view(torch.uint8).numpy().tobytes()
        for name, parameter in model.named_parameters()
    }


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files of a tiny model."""
    monkeypatch.setattr(quantised.Scheme.files, "__defaults__", (4_000,))


def test_a_second_start_quantises_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, site = in_4_bits("llama"), site_at(tmp_path / "cache")
    first = values(quantised_weights(FolderWeights(base), model, site, CPU), model)
    monkeypatch.setattr(quantising, "quantise", None)
    assert values(quantised_weights(FolderWeights(base), model, site, CPU), model) == first


@pytest.mark.parametrize("change", ["base", "storage", "layers"])
def test_another_base_or_scheme_is_another_folder(change: str, base: Path, tmp_path: Path) -> None:
    cache = site_at(tmp_path / "cache")
    quantised_weights(FolderWeights(base), in_4_bits("llama"), cache, CPU)
    model = in_4_bits("llama", torch.bfloat16 if change == "storage" else torch.float32)
    if change == "base":
        os.utime(base / "model.safetensors", ns=(0, 0))
    if change == "layers":
        model = meta_model(tiny_config("llama"), "fp32")
        nf4.swap_linears(model, ["model.layers.0.mlp.up_proj"], torch.float32)
    quantised_weights(FolderWeights(base), model, cache, CPU)
    assert len([path for path in (tmp_path / "cache/quantised").iterdir() if path.is_dir()]) == 2


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("file", ["weights", "manifest.json", "COMMITTED"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_found_and_all_is_made_again(file: str, damage: str, base: Path, tmp_path: Path) -> None:
    model, site = in_4_bits("llama"), site_at(tmp_path / "cache")
    quantised_weights(FolderWeights(base), model, site, CPU)
    folder = artefact(tmp_path / "cache")
    before = tree_digests(folder)
    assert len(before) > 4
    path = sorted(folder.glob("weights-*"))[1] if file == "weights" else folder / file
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    quantised_weights(FolderWeights(base), model, site, CPU)
    if (file, damage) != ("COMMITTED", "truncate"):  # the newline alone
        assert tree_digests(artefact(tmp_path / "cache")) == before


def test_what_a_crash_left_is_cleared_and_what_a_living_run_makes_stays(base: Path, tmp_path: Path) -> None:
    from outgrow.streaming.tiers.lease import Holder, Lease

    above = tmp_path / "cache/quantised"
    for name in ("dead", "bare", "living"):
        (above / f".making-{name}").mkdir(parents=True)
        (above / f".making-{name}/weights-00001-of-00001.safetensors").write_bytes(b"half")
    Lease.take(above / ".making-dead").close()
    Holder.here("run", 1).write(above / ".making-living")
    lease = Lease.take(above / ".making-living")
    try:
        quantised_weights(FolderWeights(base), in_4_bits("llama"), site_at(tmp_path / "cache"), CPU)
    finally:
        lease.close()
    assert {path.name for path in above.glob(".making-*")} == {".making-living"}


def test_a_disk_without_room_is_refused_before_it_is_written_to(base: Path, tmp_path: Path) -> None:
    tier = {"name": "fast", "path": str(tmp_path / "fast"), "reserve": "900 TB"}
    with pytest.raises(PlanError, match=r"the weights in 4 bits take [\d,]+ bytes, and the disk has 0 to give"):
        quantised_weights(FolderWeights(base), in_4_bits("llama"), site_at(tmp_path / "cache", tiers=[tier]), CPU)
    assert not list((tmp_path / "fast").rglob("*.safetensors"))


def test_the_first_tier_has_it_and_a_whole_copy_on_another_serves(base: Path, tmp_path: Path) -> None:
    tiers = [{"name": name, "path": str(tmp_path / name), "reserve": "0 B"} for name in ("fast", "slow")]
    site, model = site_at(tmp_path / "cache", tiers=tiers), in_4_bits("llama")
    first = values(quantised_weights(FolderWeights(base), model, site, CPU), model)
    (tmp_path / "slow").mkdir()
    shutil.move(tmp_path / "fast/quantised", tmp_path / "slow/quantised")
    assert values(quantised_weights(FolderWeights(base), model, site, CPU), model) == first
    assert not (tmp_path / "fast/quantised").exists()


def test_numbers_that_are_not_finite_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: not all of its numbers are finite"):
        quantised_weights(FolderWeights(base), in_4_bits("llama"), site_at(tmp_path / "cache"), CPU)
    assert not [path for path in (tmp_path / "cache/quantised").iterdir() if path.is_dir()]


# --- by several ranks -------------------------------------------------------------------------------------------------


class Ranks:
    """Ranks as threads, each with a ``gather`` that waits for all."""

    def __init__(self, count: int) -> None:
        self._barrier = threading.Barrier(count, timeout=60)
        self._texts = [""] * count
        self.answers: list[Any] = [None] * count

    def run(self, work: Callable[[int, Callable[[str], list[str]]], Any]) -> list[Any]:
        threads = [threading.Thread(target=self._one, args=(rank, work)) for rank in range(len(self.answers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.answers

    def _one(self, rank: int, work: Callable[[int, Callable[[str], list[str]]], Any]) -> None:
        def gather(text: str) -> list[str]:
            self._texts[rank] = text
            self._barrier.wait()
            texts = list(self._texts)
            self._barrier.wait()
            return texts

        try:
            self.answers[rank] = work(rank, gather)
        except Exception as error:
            self.answers[rank] = error
            # A rank that fails as it was told to has met the others by then; they may still be on their way out of the barrier.
            if not isinstance(error, OutgrowError | OSError):
                self._barrier.abort()


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("placing", [["a", "a", "a"], ["a", "b", "a"]])
def test_ranks_share_the_work_of_their_node_and_get_the_same(
    placing: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each node has a cache of its own, and one of them is made already in the end."""
    model = in_4_bits("llama")
    alone = values(quantised_weights(FolderWeights(base), model, site_at(tmp_path / "alone"), CPU), model)
    monkeypatch.setattr(quantising, "_Node", FakeNode)
    written: list[tuple[int, str]] = []
    write = quantising._write_files

    def note(scheme: Any, folder: Any, aside: Path, names: list[str], device: Any) -> dict[str, str]:
        written.extend((threading.get_ident(), name) for name in names)
        return write(scheme, folder, aside, names, device)

    monkeypatch.setattr(quantising, "_write_files", note)

    def work(rank: int, gather: Callable[[str], list[str]]) -> dict[str, bytes]:
        FakeNode.here.rank = (rank, placing)
        site = site_at(tmp_path / placing[rank])
        return values(quantised_weights(FolderWeights(base), model, site, CPU, gather), model)

    assert Ranks(len(placing)).run(work) == [alone] * 3
    files = {name for _, name in written}
    assert len(written) == len(files) * len(set(placing))
    assert len({thread for thread, _ in written}) == 3
    shutil.rmtree(artefact(tmp_path / "a"))
    written.clear()
    assert Ranks(len(placing)).run(work) == [alone] * 3
    assert {name for _, name in written} == files and len(written) == len(files)


class FakeNode(quantising._Node):
    """The ranks of a made-up node: threads of one process."""

    here = threading.local()

    @classmethod
    def of(cls, gather: Callable[[str], list[str]]) -> quantising._Node:
        rank, placing = cls.here.rank
        gather("")
        ranks = tuple(other for other, host in enumerate(placing) if host == placing[rank])
        return quantising._Node(ranks.index(rank), ranks)


@pytest.mark.usefixtures("small_files")
def test_where_one_rank_fails_all_fail_and_nothing_stays(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantising, "_Node", FakeNode)
    model, placing = in_4_bits("llama"), ["a", "a", "b"]
    write = quantising._write_files

    def fail(scheme: Any, folder: Any, aside: Path, names: list[str], device: Any) -> dict[str, str]:
        if FakeNode.here.rank[0] == 1:
            raise OSError(28, "No space left on device")
        return write(scheme, folder, aside, names, device)

    monkeypatch.setattr(quantising, "_write_files", fail)

    def work(rank: int, gather: Callable[[str], list[str]]) -> Any:
        FakeNode.here.rank = (rank, placing)
        return quantised_weights(FolderWeights(base), model, site_at(tmp_path / placing[rank]), CPU, gather)

    answers = Ranks(len(placing)).run(work)
    assert isinstance(answers[1], OSError)
    for rank in (0, 2):
        assert isinstance(answers[rank], TrainingError) and "rank 1: OSError: [Errno 28] No space left" in str(answers[rank])
    assert not [path for host in "ab" for path in (tmp_path / host / "quantised").iterdir() if path.is_dir()]


def test_nodes_that_hold_other_numbers_are_told_so(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when one was made by another version of a kernel: every byte is right by its own manifest."""
    from outgrow.streaming.manifest import commit

    monkeypatch.setattr(quantising, "_Node", FakeNode)
    model, placing = in_4_bits("llama"), ["a", "b"]
    for host in placing:
        quantised_weights_of_one(base, model, tmp_path / host, monkeypatch)
    other = artefact(tmp_path / "b")
    file = next(other.glob("weights-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    facts = json.loads((other / "manifest.json").read_bytes())
    for name in ("manifest.json", "COMMITTED"):
        (other / name).unlink()
    commit(other, "manifest.json", {key: value for key, value in facts.items() if key != "files"})

    def work(rank: int, gather: Callable[[str], list[str]]) -> Any:
        FakeNode.here.rank = (rank, placing)
        return quantised_weights(FolderWeights(base), model, site_at(tmp_path / placing[rank]), CPU, gather)

    for answer in Ranks(len(placing)).run(work):
        assert isinstance(answer, IntegrityError) and "is another on ranks 1 than on rank 0" in str(answer)


def quantised_weights_of_one(base: Path, model: nn.Module, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNode.here.rank = (0, ["x"])
    quantised_weights(FolderWeights(base), model, site_at(cache), CPU)
