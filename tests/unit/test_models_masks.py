"""Packed rows: masks against a slow twin, packed documents against documents one by one, and no way from one to another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tiny_models import FAMILIES

from outgrow.streaming.packing import PackedRows, pack
from outgrow.streaming.row_windows import Span
from outgrow.trainers.models.families import attention_implementation
from outgrow.trainers.models.masks import attention_inputs, visible
from outgrow.trainers.models.probes import lively
from outgrow.trainers.models.tiny import VOCABULARY, tiny_config

SEGMENTS = torch.tensor([[0] * 9 + [1] * 12 + [-1] * 3, [0] * 24, [0] * 1 + [1] * 22 + [-1]], dtype=torch.int32)
POSITIONS = torch.tensor(
    [[*range(9), *range(12), *range(3)], [*range(24)], [0, *range(22), 0]],
)


def token_ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(seed))


def documents() -> list[tuple[int, slice]]:
    return [(0, slice(0, 9)), (0, slice(9, 21)), (1, slice(0, 24)), (2, slice(0, 1)), (2, slice(1, 23))]


@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_mask_is_the_slow_twin(window: int | None) -> None:
    mask = visible(SEGMENTS, window)
    assert mask.shape == (3, 1, 24, 24)
    for row in range(3):
        for query in range(24):
            for key in range(24):
                sees = key <= query and SEGMENTS[row, query] == SEGMENTS[row, key] and (window is None or query - key < window)
                assert bool(mask[row, 0, query, key]) == bool(sees)


def test_every_query_sees_itself() -> None:
    assert visible(SEGMENTS, 1).diagonal(dim1=2, dim2=3).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_documents_one_by_one(family: str) -> None:
    config = tiny_config(family)
    model = lively(config, "fp64")
    ids = token_ids()
    packed = model(input_ids=ids, **attention_inputs(config, SEGMENTS, POSITIONS)).logits
    assert packed.isfinite().all()
    for row, part in documents():
        alone = model(input_ids=ids[row : row + 1, part], use_cache=False).logits[0]
        # Its attention in plain operations takes the softmax in float32, whose sums depend on the length of a row.
        torch.testing.assert_close(packed[row, part], alone, rtol=0, atol=1e-5 if family == "gemma2" else 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_one_document_leaves_the_next_bit_equal(family: str) -> None:
    config = tiny_config(family)
    ids = token_ids()
    changed = ids.clone()
    changed[0, :9] = token_ids(seed=1)[0, :9]
    # A mixture of experts multiplies all tokens of an expert at once, and how a product is rounded depends on their number.
    exact = family != "mixtral"
    model = lively(config, "fp32" if exact else "fp64")
    inputs = attention_inputs(config, SEGMENTS, POSITIONS)
    before, after = model(input_ids=ids, **inputs).logits, model(input_ids=changed, **inputs).logits
    assert not torch.equal(before[0, :9], after[0, :9])
    torch.testing.assert_close(after[0, 9:21], before[0, 9:21], rtol=0, atol=0.0 if exact else 1e-12)


@dataclass(frozen=True)
class PairStream:
    """One row of two preference pairs, of 11 and 9 tokens, and padding."""

    sequence_length: int = 24
    pairs: bool = True

    def spans(self, row: int) -> list[Span]:
        return [Span(0, 0, 11), Span(1, 0, 9)]


@dataclass(frozen=True)
class Pairs:
    """Its documents: the answers are tokens 0 to 6 and 6 to 11 of the first, 0 to 4 and 4 to 9 of the second."""

    ids: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]

    def tokens(self, document: int) -> npt.NDArray[np.int64]:
        return self.ids[document]

    def weights(self, document: int) -> None:
        return None

    def spans(self, document: int) -> npt.NDArray[np.int32]:
        return np.array([[[0, 6], [6, 11]], [[0, 4], [4, 9]]][document], np.int32)


def packed_pairs(ids: torch.Tensor) -> PackedRows:
    """The row as the loader packs it, its 20 tokens those of ``ids``."""
    source = Pairs((ids[0, :11].numpy(), ids[0, 11:20].numpy()))
    return pack([0], [PairStream()], np.array([0, 1]), [source], fill_token=0)  # type: ignore[list-item]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("half", range(4))
def test_the_halves_of_a_pair_do_not_see_each_other(family: str, half: int) -> None:
    """Chosen and rejected of two pairs in one row: whichever changes, the scores of the other three are bit-equal."""
    config = tiny_config(family)
    ids, others = token_ids(), token_ids(seed=1)
    rows = packed_pairs(ids)
    mine = torch.from_numpy(rows.pairs[0] == half)
    assert [int((rows.pairs == number).sum()) for number in range(4)] == [6, 5, 4, 5]
    changed_ids = torch.where(mine[:20], others[:1, :20], ids[:1, :20])
    changed = packed_pairs(changed_ids)
    inputs = attention_inputs(config, torch.from_numpy(rows.segments), torch.from_numpy(rows.positions))
    exact = family != "mixtral"  # see above
    model = lively(config, "fp32" if exact else "fp64")
    with torch.no_grad():
        before, after = (model(input_ids=torch.from_numpy(own.token_ids), **inputs).logits[0] for own in (rows, changed))
    assert not torch.equal(before[mine], after[mine])
    torch.testing.assert_close(after[~mine], before[~mine], rtol=0, atol=0.0 if exact else 1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_flows_from_one_document_to_another(family: str) -> None:
    config = tiny_config(family)
    model = lively(config)
    embeddings = model.get_input_embeddings()(token_ids()).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, **attention_inputs(config, SEGMENTS, POSITIONS)).logits
    logits[0, 9:21].square().sum().backward()
    gradient = embeddings.grad
    assert gradient is not None
    assert gradient[0, 9:21].abs().sum(-1).gt(0).all()
    assert gradient[0, :9].count_nonzero() == 0
    assert gradient[0, 21:].count_nonzero() == 0
    assert gradient[1:].count_nonzero() == 0


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_a_layer_with_a_window_does_not_see_beyond_it(family: str) -> None:
    config = tiny_config(family)
    for layer in range(config.num_hidden_layers):
        if getattr(config, "layer_types", None):
            config.layer_types[layer] = "sliding_attention"
    model = lively(config)
    embeddings = model.get_input_embeddings()(token_ids()).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, **attention_inputs(config, SEGMENTS, POSITIONS)).logits
    logits[1, 23].square().sum().backward()
    reach = config.num_hidden_layers * (config.sliding_window - 1)
    seen = embeddings.grad[1].abs().sum(-1) > 0  # type: ignore[index]
    assert not seen[: 23 - reach].any()
    assert seen[23 - reach :].all()


def test_soft_capped_attention_is_eager_because_sdpa_leaves_the_cap_out() -> None:
    config = tiny_config("gemma2")
    assert attention_implementation(config) == "eager"
    model = lively(config, "fp64")
    with torch.no_grad():
        capped = model(input_ids=token_ids(), use_cache=False).logits
        model.config._attn_implementation = "sdpa"
        by_sdpa = model(input_ids=token_ids(), use_cache=False).logits
    assert (capped - by_sdpa).abs().max() > 0.1
    config.attn_logit_softcapping = None
    assert attention_implementation(config) == "sdpa"
