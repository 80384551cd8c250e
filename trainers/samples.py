"""What the model writes along the way: prompts continued greedily, by the very engine that trains.

All ranks run the same forward passes on the same tokens, and always as many: an engine that shards needs every rank in each
of them, and a rank that stopped early would leave the others waiting. Nothing is drawn, no gradient is made, and no cache of
keys and values is kept, so training goes on bit for bit as it would have without.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from outgrow.trainers.engines import Engine

_TOGETHER = 8
"""Prompts in one forward pass: each passes all parameters once, and each prompt takes memory for its logits."""


@dataclass
class _Text:
    """A prompt as it grows; ``problem`` where it cannot."""

    prompt: str
    given: tuple[int, ...]
    room: int
    problem: str = ""
    made: list[int] = field(default_factory=list)


def continue_prompts(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int, max_length: int, eos_token_id: int
) -> list[dict[str, str]]:
    """``prompt`` and ``text`` of each prompt, on every rank: the likeliest next token, up to ``num_tokens`` times.

    A text ends before ``eos_token_id``, and with prompt and all at ``max_length`` tokens; a prompt that is empty, or leaves no
    room, has a ``problem`` instead. A collective.
    """
    texts = [_begin(tokenizer, prompt, max_length) for prompt in prompts]
    able = [text for text in texts if not text.problem]
    for at in range(0, len(able), _TOGETHER):
        together = able[at : at + _TOGETHER]
        for _ in range(min(num_tokens, max(text.room for text in together))):
            _grow(engine, together)
    return [_shown(tokenizer, text, eos_token_id) for text in texts]


def _begin(tokenizer: Tokenizer, prompt: str, max_length: int) -> _Text:
    given = tuple(tokenizer.encode(prompt, add_special_tokens=False).ids)
    room = max_length - len(given)
    problem = ""
    if not given:
        problem = "the prompt has no token"
    elif room < 1:
        problem = f"the prompt has {len(given)} tokens, which leaves no room in {max_length}"
    return _Text(prompt, given, room, problem)


def _grow(engine: Engine, texts: Sequence[_Text]) -> None:
    """One token more for each; one without room is carried along as it is."""
    rows = [[*text.given, *text.made] for text in texts]
    length = max(map(len, rows))
    # Padding stands before the text, so that the last position is the one asked for in every row.
    token_ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    segments = torch.tensor([[-1] * (length - len(row)) + [0] * len(row) for row in rows], dtype=torch.int32)
    positions = torch.tensor([[*range(length - len(row)), *range(len(row))] for row in rows])
    chosen = engine.logits(token_ids, segments, positions).argmax(-1).tolist()
    for text, token in zip(texts, chosen, strict=True):
        if len(text.made) < text.room:
            text.made.append(token)


def _shown(tokenizer: Tokenizer, text: _Text, eos_token_id: int) -> dict[str, str]:
    if text.problem:
        return {"prompt": text.prompt, "text": "", "problem": text.problem}
    made = text.made[: text.made.index(eos_token_id)] if eos_token_id in text.made else text.made
    # Decoded together: alone, the first piece of some tokenizers would lose its space.
    before = tokenizer.decode(list(text.given), skip_special_tokens=False)
    whole = tokenizer.decode([*text.given, *made], skip_special_tokens=False)
    return {"prompt": text.prompt, "text": whole[len(before) :]}
