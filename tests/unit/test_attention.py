"""Attention kinds: what each is told of packed rows against slow twins, and every tested family through each of them.

The kernels of GPUs do not run here: slow ones that take the same arguments stand in for them.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES
from torch.nn.attention import flex_attention
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from outgrow.errors import ModelError
from outgrow.trainers.models import attention
from outgrow.trainers.models.attention import FLASH, FLEX, SDPA, VARLEN, by_documents, implementation, set_attention
from outgrow.trainers.models.block_masks import BLOCK, block_mask, document_numbers, squares
from outgrow.trainers.models.masks import attention_inputs, document_ends, one_document_a_row, visible
from outgrow.trainers.models.probes import lively
from outgrow.trainers.models.tiny import VOCABULARY, tiny_config

CPU = torch.device("cpu")


def rows(*lengths: list[int], length: int) -> torch.Tensor:
    """Segments of rows whose documents have these lengths; what is left is padding."""
    segments = torch.full((len(lengths), length), -1, dtype=torch.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for number, size in enumerate(documents):
            segments[row, start : start + size] = number
            start += size
    return segments


PACKED = rows([9, 12], [24], [1, 22], length=24)
LONG = rows([100, 150, 200], [450], [128, 128, 100], [1] * 440, length=450)


def positions_of(segments: torch.Tensor) -> torch.Tensor:
    positions = torch.zeros(segments.shape, dtype=torch.int64)
    for row in range(len(segments)):
        for at in range(1, segments.shape[1]):
            same = segments[row, at] == segments[row, at - 1]
            positions[row, at] = positions[row, at - 1] + 1 if same else 0
    return positions


def token_ids(segments: torch.Tensor) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, segments.shape, generator=torch.Generator().manual_seed(0))


def logits(model: Any, segments: torch.Tensor) -> torch.Tensor:
    inputs = attention_inputs(model.config, segments, positions_of(segments))
    found: torch.Tensor = model(input_ids=token_ids(segments), **inputs).logits
    return found


@pytest.mark.parametrize("segments", [PACKED, LONG, rows([5], length=5)], ids=["short", "long", "one"])
def test_ends_are_the_slow_twin(segments: torch.Tensor) -> None:
    begins, longest, size = [], 0, 0
    for row in segments.tolist():
        for at, segment in enumerate(row):
            size = size + 1 if at and segment == row[at - 1] else 1
            longest = max(longest, size)
            if size == 1:
                begins.append(len(row) * segments.tolist().index(row) + at)
    ends, bound = document_ends(segments)
    assert ends.dtype == torch.int32 and (len(ends) - 1) % 8 == 0 and len(begins) < len(ends) <= max(9, 1.25 * len(begins) + 1)
    assert ends[: len(begins)].tolist() == begins
    assert set(ends[len(begins) :].tolist()) == {segments.numel()}
    assert longest <= bound <= segments.shape[1]


def test_few_lengths_come_up() -> None:
    """So that compiled blocks and kernels are not made anew for every batch."""
    found = {document_ends(rows([size, 512 - size], length=512))[1] for size in range(1, 512)}
    assert found == {256, 512}
    assert len({len(document_ends(rows([1] * count, length=1000))[0]) for count in range(1, 1000)}) == 24


@pytest.mark.parametrize(
    ("segments", "alone"),
    [
        (rows([24], [24], length=24), True),
        (rows([20], [24], length=24), True),
        (rows([], length=24), True),
        (PACKED, False),
        (rows([12, 12], length=24), False),
        (rows([24], length=24).flip(1), True),
        (rows([20], length=24).flip(1), False),
    ],
)
def test_rows_of_one_document_are_told_from_packed_ones(segments: torch.Tensor, alone: bool) -> None:
    assert one_document_a_row(segments) == alone


@pytest.mark.parametrize("window", [None, 1, 5, 100, 128, 200, 1000])
def test_squares_are_the_slow_twin(window: int | None) -> None:
    """A square that is left out has nothing to see, one that is whole has nothing hidden."""
    some, whole = squares(document_numbers(LONG), window)
    sees = visible(LONG, window)[:, 0]
    for row in range(len(LONG)):
        for query in range(4):
            for key in range(4):
                square = sees[row, query * BLOCK : (query + 1) * BLOCK, key * BLOCK : (key + 1) * BLOCK]
                is_whole = bool(square.all()) and square.shape == (BLOCK, BLOCK)
                assert bool(whole[row, query, key]) == is_whole
                if square.any() and not is_whole:
                    assert some[row, query, key]
                assert not (some[row, query, key] and whole[row, query, key])
    if window is None:
        needed = torch.nn.functional.max_pool2d(sees.float(), BLOCK, ceil_mode=True).bool()
        assert torch.equal(some | whole, needed), "without a window none is computed in vain"


@pytest.mark.parametrize("window", [None, 5, 200])
def test_a_block_mask_has_these_squares(window: int | None) -> None:
    mask = block_mask(LONG, window, CPU)
    some, whole = squares(document_numbers(LONG), window)
    assert torch.equal(mask.to_dense()[:, 0].bool(), some | whole)
    assert mask.shape == (4, 1, 450, 450)
    for query, key in [(0, 0), (449, 0), (449, 300), (120, 99), (120, 100), (260, 250)]:
        found = mask.mask_mod(*(torch.tensor(i) for i in (0, 0, query, key)))
        assert bool(found) == bool(visible(LONG, window)[0, 0, query, key])


@pytest.fixture
def flex_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """flex_attention without compiling, whose arithmetic has a backward pass on a CPU where the compiled one has none."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "_compiled_flex_attention", lambda: flex_attention.flex_attention)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.usefixtures("flex_on_a_cpu")
@pytest.mark.parametrize(("window", "cap"), [(None, None), (5, 3.0)])
def test_flex_is_plain_attention_and_so_is_its_gradient(window: int | None, cap: float | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 24, 8, requires_grad=True) for heads in (4, 2, 2))
    found, _ = attention._flex(None, query, key, value, block_mask(PACKED, window, CPU), scaling=0.3, softcap=cap)  # type: ignore[arg-type]
    scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(2, 3)
    scores = scores if cap is None else cap * torch.tanh(scores / cap)
    shares = scores.masked_fill(~visible(PACKED, window), -torch.inf).softmax(-1)
    expected = (shares @ value.repeat_interleave(2, 1)).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip(
        *(torch.autograd.grad(output.square().sum(), (query, key, value)) for output in (found, expected)), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("flex_on_a_cpu")
@pytest.mark.parametrize("family", FAMILIES)
def test_families_compute_the_same_by_flex(family: str) -> None:
    model = lively(tiny_config(family))
    with torch.no_grad():
        expected = logits(model, PACKED)
        model.config._attn_implementation = FLEX
        torch.testing.assert_close(logits(model, PACKED), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by torch's compiler, of torch
def test_compiled_flex_reads_the_squares() -> None:
    """Forward alone, which is what there is of it on a CPU; here no square that the mask leaves out is computed."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(4, heads, 450, 16) for heads in (4, 2, 2))
    with torch.no_grad():
        found, _ = attention._flex(None, query, key, value, block_mask(LONG, 200, CPU), scaling=0.3, softcap=3.0)  # type: ignore[arg-type]
        scores = 3.0 * torch.tanh(0.3 * query @ key.repeat_interleave(2, 1).transpose(2, 3) / 3.0)
        shares = scores.masked_fill(~visible(LONG, 200), -torch.inf).softmax(-1)
    torch.testing.assert_close(found, (shares @ value.repeat_interleave(2, 1)).transpose(1, 2))


def slow_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    ends: torch.Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One document after the other, one query after the other."""
    output = torch.full_like(query, torch.nan)
    groups = query.shape[1] // key.shape[1]
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        assert stop - start <= longest
        for at in range(start, stop):
            first = start if window is None else max(start, at - window + 1)
            for head in range(query.shape[1]):
                scores = scale * key[first : at + 1, head // groups] @ query[at, head]
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                output[at, head] = scores.softmax(0) @ value[first : at + 1, head // groups]
    return output


@pytest.fixture
def slow_kernels() -> Iterator[None]:
    for name in (VARLEN, FLASH):
        assert name not in ALL_ATTENTION_FUNCTIONS, "without a GPU no test has set them"
        AttentionInterface.register(name, by_documents(slow_kernel))
    yield
    for name in (VARLEN, FLASH):
        del AttentionInterface._global_mapping[name]


@pytest.mark.usefixtures("slow_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_families_tell_kernels_of_documents_windows_and_soft_caps(family: str) -> None:
    model = lively(tiny_config(family), "fp64")
    tolerance = 1e-9 if family != "gemma2" else 1e-5  # whose plain attention is in float32 inside
    with torch.no_grad():
        expected = logits(model, PACKED)
        for kind in (VARLEN, FLASH):
            model.config._attn_implementation = kind
            torch.testing.assert_close(logits(model, PACKED), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
@pytest.mark.parametrize("segments", [PACKED, rows([24], [20], [3], length=24)], ids=["packed", "one document a row"])
def test_our_sdpa_is_that_of_transformers(family: str, segments: torch.Tensor) -> None:
    model = lively(tiny_config(family), "fp64")
    model.config._attn_implementation = "sdpa"
    expected = logits(model, segments)
    model.config._attn_implementation = SDPA
    counted = segments >= 0
    torch.testing.assert_close(logits(model, segments)[counted], expected[counted], rtol=0, atol=1e-9)
    inputs = attention_inputs(model.config, segments, positions_of(segments))["attention_mask"]
    masks = inputs if isinstance(inputs, dict) else {"all": inputs}
    windows = getattr(model.config, "sliding_window", None) is not None
    assert any(mask is None for mask in masks.values()) == (segments is not PACKED and (not windows or len(masks) > 1))


def fake_varlen(*options: str) -> tuple[Any, dict[str, Any]]:
    """``varlen_attn`` of a release of torch that knows ``options``, and what it was last given."""
    given: dict[str, Any] = {}

    def newest(
        query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, *,
        window_size: tuple[int, int] = (-1, -1), scale: float | None = None, enable_gqa: bool = False,
    ) -> Any:  # fmt: skip
        given.update(query=query, key=key, value=value, window_size=window_size, scale=scale, enable_gqa=enable_gqa)
        return query

    def oldest(query: Any, key: Any, value: Any, cu_seq_q: Any, cu_seq_k: Any, max_q: int, max_k: int, is_causal: bool) -> Any:
        given.update(query=query, key=key, value=value, is_causal=is_causal)
        return query

    return (newest if options else oldest), given


def test_varlen_of_torch_is_given_what_its_release_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(6, 4, 16), torch.randn(6, 2, 16)
    ends = torch.tensor([0, 6])
    for window, expected in [(None, (-1, 0)), (3, (2, 0))]:
        function, given = fake_varlen("all")
        monkeypatch.setattr(attention, "_varlen_kernel", lambda function=function: function)
        attention._varlen()(query, key, key, ends, 6, scale=0.5, window=window, softcap=None)
        assert (given["window_size"], given["scale"], given["enable_gqa"]) == (expected, 0.5, True)
    function, given = fake_varlen()
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: function)
    attention._varlen()(query, key, key, ends, 6, scale=0.5, window=None, softcap=None)
    assert given["is_causal"] and given["key"].shape == (6, 4, 16)
    torch.testing.assert_close(given["query"], query * 0.5 * 4)


def test_the_installed_varlen_takes_what_it_is_given() -> None:
    """As far as a CPU can say: the arguments are taken, and the shape of the result is known."""
    query, key = (torch.empty(6, heads, 16, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    ends = torch.empty(2, dtype=torch.int32, device="meta")
    found = attention._varlen()(query, key, key, ends, 6, scale=0.5, window=3, softcap=None)
    assert found.shape == (6, 4, 16)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that says it is a GPU, with Triton and without flash-attn."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "has_triton", lambda: True)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    return torch.device("cuda")


def config_of(family: str, **keys: Any) -> PretrainedConfig:
    config = tiny_config(family)
    for key, value in keys.items():
        setattr(config, key, value)
    return config


def test_auto_is_the_fastest_that_there_is(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    llama, gemma, unknown = config_of("llama"), config_of("gemma2"), config_of("llama", model_type="unknown")
    assert implementation("auto", llama, "bf16", CPU) == SDPA
    assert implementation("auto", gemma, "bf16", CPU) == "eager"
    assert implementation("auto", unknown, "fp32", CPU) == "sdpa"
    assert implementation("auto", llama, "bf16", hopper) == VARLEN
    assert implementation("auto", llama, "fp32", hopper) == SDPA
    assert implementation("auto", gemma, "bf16", hopper) == FLEX
    assert implementation("auto", unknown, "bf16", hopper) == "sdpa"
    assert implementation("auto", config_of("llama", head_dim=512), "bf16", hopper) == SDPA
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    monkeypatch.setattr(attention, "_flash_fails", lambda device: "")
    assert implementation("auto", llama, "bf16", hopper) == FLASH
    assert implementation("auto", gemma, "bf16", hopper) == FLASH
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: None)
    assert implementation("auto", llama, "bf16", hopper) == SDPA


def test_flash_attention_that_is_built_for_other_cards_is_passed_over(
    hopper: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*tensors: torch.Tensor) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=fails))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "RTX PRO 6000")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    said = attention._flash_fails.__wrapped__
    assert said(CPU).endswith(
        "with this torch on RTX PRO 6000: CUDA error: no kernel image is available for execution on the device"
    )
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "import of flash_attn halted" in said(CPU)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=lambda *tensors: tensors[0]))
    assert said(CPU) == ""
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    monkeypatch.setattr(attention, "_flash_fails", lambda device: "not for it")
    assert implementation("auto", config_of("llama"), "bf16", hopper) == VARLEN


@pytest.mark.parametrize(
    ("dtype", "width", "masked", "expected"),
    [
        (torch.bfloat16, 128, False, True),
        (torch.bfloat16, 128, True, False),
        (torch.float32, 128, False, False),
        (torch.bfloat16, 256, False, True),
        (torch.bfloat16, 208, False, False),
        (torch.bfloat16, 512, False, False),
    ],
)
def test_keys_are_repeated_where_no_kernel_of_a_gpu_takes_fewer(
    dtype: torch.dtype, width: int, masked: bool, expected: bool
) -> None:
    """Else PyTorch falls back to products that hold all L x L scores, which no forecast counts."""
    query: Any = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 4, 8, width))
    mask = torch.zeros(1) if masked else None
    assert attention.takes_fewer_key_heads(query, mask) == expected
    assert attention.takes_fewer_key_heads(torch.zeros(1, 4, 8, 16), mask)


def test_what_cannot_be_had_is_refused_with_what_can(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(kind: Any, family: str, device: torch.device, precision: Any = "bf16", **keys: Any) -> str:
        with pytest.raises(ModelError) as raised:
            implementation(kind, config_of(family, **keys), precision, device)
        return str(raised.value)

    assert "soft cap" in said("sdpa", "gemma2", CPU) and "auto, eager" in said("sdpa", "gemma2", CPU)
    assert "for GPUs" in said("varlen", "llama", CPU) and "auto, sdpa, eager" in said("varlen", "llama", CPU)
    assert "no backward pass on a CPU" in said("flex", "llama", CPU)
    assert "soft cap" in said("varlen", "gemma2", hopper) and "flex" in said("varlen", "gemma2", hopper)
    assert "precision: bf16" in said("varlen", "llama", hopper, "fp32")
    assert "float64" in said("flex", "llama", hopper, "fp64")
    assert "head has 260 dimensions" in said("varlen", "llama", hopper, head_dim=260)
    assert "pip install flash-attn" in said("flash_attention_2", "llama", hopper)
    assert "only for llama" in said("flex", "llama", hopper, model_type="unknown")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "Tesla T4 is older" in said("varlen", "llama", hopper)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: fake_varlen()[0])
    assert "knows no windows" in said("varlen", "mistral", hopper)
    assert implementation("varlen", config_of("llama"), "bf16", hopper) == VARLEN


def test_a_model_is_set_before_it_is_called() -> None:
    model = lively(tiny_config("llama"))
    set_attention(model, "sdpa", "fp32", CPU)
    assert model.config._attn_implementation == SDPA
    copied = copy.deepcopy(model.config).to_dict()
    assert not any("outgrow" in str(value) for value in copied.values()), "an export does not name functions of ours"


def test_a_compiled_block_traces_no_fetching(hopper: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler warns of every ``@cache`` that it goes through, and warnings are errors here."""
    monkeypatch.setattr(attention, "_varlen_kernel", cache(lambda: fake_varlen("all")[0]))
    model = lively(tiny_config("llama"))
    set_attention(model, "varlen", "bf16", hopper)
    function = ALL_ATTENTION_FUNCTIONS[VARLEN]
    try:
        set_attention(lively(tiny_config("llama")), "auto", "bf16", hopper)
        assert ALL_ATTENTION_FUNCTIONS[VARLEN] is function, "the second model is no reason to compile again"
        query, key = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16)
        ends = {"cu_seq_lens_q": torch.tensor([0, 6]), "max_length_q": 6}
        traced = torch.compile(lambda *tensors: function(None, *tensors, None, **ends)[0], backend="eager", fullgraph=True)
        torch.testing.assert_close(traced(query, key, key), query.transpose(1, 2))
    finally:
        del AttentionInterface._global_mapping[VARLEN]
