"""The probes that a family must pass before outgrow trains it, on a small model of it with every feature switched on.

Each asks one question about the installed transformers and torch: does packing leak, is every parameter born by the family's
own rules, do weights come back from a folder, does sharding change the loss, does an exported model compute what was trained.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer  # type: ignore[import-untyped]
from tokenizers.models import WordLevel  # type: ignore[import-untyped]
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from outgrow.recipes.schema.training import Precision
from outgrow.trainers.engines.materialise import materialise
from outgrow.trainers.export import export
from outgrow.trainers.models.build import meta_model
from outgrow.trainers.models.families import attention_implementation
from outgrow.trainers.models.initialise import SeededWeights, module_seed
from outgrow.trainers.models.masks import attention_inputs
from outgrow.trainers.models.sharded_probe import measure, measure_on_two_ranks
from outgrow.trainers.models.tiny import VOCABULARY
from outgrow.trainers.models.weights import FolderWeights, tied_names
from outgrow.trainers.regions import Region, TensorSource, fill

SEED = 11


class ProbeFailure(Exception):
    """What a probe found, in one line."""


@dataclass(frozen=True)
class Outcome:
    """How one probe ended; ``detail`` is a figure where it passed, else what is wrong."""

    probe: str
    passed: bool
    detail: str


def run_probes(config: PretrainedConfig, folder: Path) -> Iterator[Outcome]:
    """The outcome of every probe in turn; ``config`` is of ``tiny_config``, ``folder`` is empty and stays the caller's."""
    for name, probe in PROBES.items():
        place = folder / name
        place.mkdir()
        try:
            yield Outcome(name, True, probe(config, place))
        except Exception as error:  # a probe asks whether foreign code works: whatever it raises is the answer
            yield Outcome(
                name, False, f"{type(error).__name__}: {error}" if not isinstance(error, ProbeFailure) else str(error)
            )


def filled(config: PretrainedConfig, source: TensorSource, precision: Precision = "fp32") -> PreTrainedModel:
    """A whole model on the CPU with the parameters of ``source``, made as the engines make theirs."""
    model = meta_model(config, precision)
    materialise(model, torch.device("cpu"))
    for name, parameter in model.named_parameters():
        fill(parameter, name, source)
    return model


def lively(config: PretrainedConfig, precision: Precision = "fp32") -> PreTrainedModel:
    """A seeded model with its matrices ten times as large: attention is far from even, so that a wrong mask or cap shows."""
    model = filled(config, SeededWeights(config, SEED), precision)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model


class HeldTensors:
    """A ``TensorSource`` over tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str, region: Region) -> torch.Tensor:
        return self._tensors[name].detach()[region.slices]


def attention(config: PretrainedConfig, folder: Path) -> str:
    """The attention that is used computes what transformers' plain one does, soft caps included."""
    model = lively(config, "fp64")
    plain: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        copy.deepcopy(config), dtype=torch.float64, attn_implementation="eager"
    )
    plain.load_state_dict(model.state_dict())
    ids = _token_ids(2, 24)
    with torch.no_grad():
        difference = _within(model(input_ids=ids, use_cache=False).logits, plain(input_ids=ids, use_cache=False).logits, 1e-4)
    return f"{attention_implementation(config)}, {difference}"


def packing(config: PretrainedConfig, folder: Path) -> str:
    """Packed documents give the scores of the documents alone, and no gradient flows from one to another."""
    model = lively(config, "fp64")
    ids = _token_ids(1, 24)
    parts = (slice(0, 9), slice(9, 21))
    segments = torch.tensor([[0] * 9 + [1] * 12 + [-1] * 3])
    positions = torch.tensor([[*range(9), *range(12), *range(3)]])
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, **attention_inputs(config, segments, positions)).logits
    logits[:, parts[1]].square().sum().backward()
    assert embeddings.grad is not None
    leaked = int(embeddings.grad.any(dim=-1)[:, : parts[1].start].sum())
    if leaked:
        raise ProbeFailure(f"{leaked} tokens of the first document have a gradient from the second")
    alone = torch.cat([model(input_ids=ids[:, part], use_cache=False).logits for part in parts], dim=1)
    return _within(logits[:, :21].detach(), alone.detach(), 1e-5)


def initialisation(config: PretrainedConfig, folder: Path) -> str:
    """Every parameter is what transformers' own initialisation gives with the seed of its module, and slices agree."""
    source = SeededWeights(config, SEED)
    expected = _initialised_by_transformers(config)
    for name, values in expected.items():
        if not torch.equal(values, _whole(source, name)):
            raise ProbeFailure(f"{name} is not what transformers' rules give")
    for ranks in (2, 4):
        for name, values in expected.items():
            parts = [source.read(name, region) for region in _row_shards(tuple(values.shape), ranks)]
            if not torch.equal(torch.cat(parts), values):
                raise ProbeFailure(f"{name} differs when {ranks} ranks draw it")
    return f"{len(expected)} parameters, bit-equal"


def load(config: PretrainedConfig, folder: Path) -> str:
    """What ``save_pretrained`` writes comes back bit-equal."""
    model = lively(config)
    model.save_pretrained(folder)
    source = FolderWeights(folder)
    source.check(meta_model(config, "fp32"))
    back = dict(filled(config, source).named_parameters())
    _require_equal(dict(model.named_parameters()), back)
    return f"{len(back)} parameters, bit-equal"


def sharding(config: PretrainedConfig, folder: Path) -> str:
    """FSDP2 on two processes has the loss and gradient norm of one process without it."""
    expected = measure(config, world=1, rank=0)
    found = measure_on_two_ranks({config.model_type: config}, folder)[config.model_type]
    for figure, value in expected.items():
        if abs(found[figure] - value) > 1e-6 * abs(value):
            raise ProbeFailure(f"{figure} is {found[figure]:.9g} on two ranks, {value:.9g} on one")
    return f"loss {found['loss']:.6f}, gradient norm {found['grad_norm']:.6f}"


def exporting(config: PretrainedConfig, folder: Path) -> str:
    """An exported folder loads in transformers, and its scores are the trained model's."""
    model = lively(config)
    model.eval()  # type: ignore[no-untyped-call]
    tensors = {f"model/{name}": parameter for name, parameter in model.named_parameters()}
    (folder / "tokenizer").mkdir()
    Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0")).save(
        str(folder / "tokenizer" / "tokenizer.json")
    )
    export(
        HeldTensors(tensors),
        config,
        folder / "tokenizer",
        folder / "out",
        dtype="fp32",
        run="probe",
        step=0,
        checkpoint_digest="",
    )
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder / "out", local_files_only=True, dtype=torch.float32, attn_implementation=attention_implementation(config)
    )
    ids = _token_ids(2, 24)
    with torch.no_grad():
        return _within(loaded(input_ids=ids).logits, model(input_ids=ids, use_cache=False).logits, 1e-5)


PROBES: Mapping[str, Callable[[PretrainedConfig, Path], str]] = {
    "attention": attention,
    "packing": packing,
    "initialisation": initialisation,
    "load": load,
    "sharding": sharding,
    "export": exporting,
}


def _initialised_by_transformers(config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """The parameters of ``from_config``, drawn again in its own order (children first), each module from its name's seed."""
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    aliases = set(tied_names(model))

    def draw_again(module: nn.Module, name: str) -> None:
        for child_name, child in module.named_children():
            draw_again(child, f"{name}.{child_name}" if name else child_name)
        own = [f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)]
        if not own or not aliases.issuperset(own):
            torch.default_generator.manual_seed(module_seed(SEED, name))
            model._init_weights(module)  # type: ignore[no-untyped-call]

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        draw_again(model, "")
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _row_shards(shape: tuple[int, ...], ranks: int) -> Iterator[Region]:
    """The rows of each rank, cut as FSDP2 cuts them; ranks that get none are left out."""
    rows = -(-shape[0] // ranks)
    for start in range(0, shape[0], rows):
        yield Region((start, *(0 for _ in shape[1:])), (min(rows, shape[0] - start), *shape[1:]))


def _whole(source: TensorSource, name: str) -> torch.Tensor:
    shape = source.shape(name)
    return source.read(name, Region.whole(shape))


def _token_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(SEED))


def _within(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str:
    """The largest difference, in words; raises ``ProbeFailure`` where it is above ``tolerance`` of the largest score."""
    difference = float((found - expected).abs().max()) / float(expected.abs().max())
    if not difference <= tolerance:
        raise ProbeFailure(f"scores differ by {difference:.1e} of the largest, more than {tolerance:.0e}")
    return f"scores within {difference:.1e}"


def _require_equal(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    for name, values in expected.items():
        if not torch.equal(values, found[name]):
            raise ProbeFailure(f"{name} came back different")
