"""What the model writes along the way: each prompt continued greedily, the same on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

from outgrow.trainers.engines import Engine


def continue_prompts(
    engine: Engine, tokenizer: Tokenizer, prompts: Sequence[str], num_tokens: int, max_length: int
) -> list[dict[str, str]]:
    """``{"prompt", "text"}`` of each prompt."""
    return []
