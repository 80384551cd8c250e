"""Text from an exported model: token by token with the cache, greedy or sampled from the nucleus, the same for one seed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from outgrow.errors import ModelError
from outgrow.storage import verify_tree
from outgrow.trainers.models.build import folder_config
from outgrow.trainers.models.families import attention_implementation
from outgrow.trainers.models.weights import FolderWeights, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def generate(
    folder: Path, prompt: str, *, max_new_tokens: int, temperature: float, top_p: float, seed: int, device: torch.device
) -> Iterator[str]:
    """Pieces of text that follow ``prompt``, until the model ends the document or ``max_new_tokens`` are made.

    ``temperature`` 0 takes the likeliest token. ``top_p`` in (0, 1] keeps the likeliest tokens that reach this probability
    together (Holtzman et al. 2019). Raises ``IntegrityError`` where an exported folder differs from its manifest.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ModelError(
            f"temperature is {temperature} and top_p {top_p}; temperature must be 0 or more, top_p above 0 and at most 1"
        )
    model, tokenizer = load(folder, device)
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    positions = model.config.max_position_embeddings
    if not ids:
        raise ModelError("the prompt is empty; give at least one character")
    if len(ids) + max_new_tokens > positions:
        raise ModelError(
            f"the prompt has {len(ids)} tokens and {max_new_tokens} are asked for, but the model has {positions} positions",
            hint=f"ask for at most {max(0, positions - len(ids))}",
        )
    generator = torch.Generator(device).manual_seed(seed)
    tokens = sample(model, ids, max_new_tokens, temperature=temperature, top_p=top_p, generator=generator)
    return _as_text(tokenizer, ids, tokens)


def load(folder: Path, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model (float32 on a CPU, else the folder's dtype) and its tokenizer. Weights in pickle files are refused."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    manifest = read_manifest(folder)
    if manifest is not None:
        verify_tree(folder, manifest.files)
    config = folder_config(folder)
    FolderWeights(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ModelError("no tokenizer.json here", where=str(folder))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32 if device.type == "cpu" else "auto",
        attn_implementation=attention_implementation(config),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call]
        folder, local_files_only=True, trust_remote_code=False
    )
    model.eval()  # type: ignore[no-untyped-call]
    return model.to(device), tokenizer  # type: ignore[arg-type]


@torch.inference_mode()
def sample(
    model: PreTrainedModel, ids: list[int], max_new_tokens: int, *, temperature: float, top_p: float, generator: torch.Generator
) -> Iterator[int]:
    """Token ids that follow ``ids``, up to the end-of-text token, which is left out."""
    ends = model.config.eos_token_id
    stop = set(ends) if isinstance(ends, list) else {ends}
    given, cache = torch.tensor([ids], device=model.device), None
    for _ in range(max_new_tokens):
        output = model(input_ids=given, past_key_values=cache, use_cache=True)
        token = choose(output.logits[0, -1].float(), temperature=temperature, top_p=top_p, generator=generator)
        if token in stop:
            return
        yield token
        given, cache = torch.tensor([[token]], device=model.device), output.past_key_values


def choose(logits: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from scores [vocabulary]."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, tokens = torch.softmax(logits / temperature, dim=-1).sort(descending=True, stable=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0)
    return int(tokens[torch.multinomial(kept, 1, generator=generator)])


def _as_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], tokens: Iterator[int]) -> Iterator[str]:
    """The text that each token adds; bytes of an unfinished character wait for the rest of it."""
    made = list(ids)
    shown = len(tokenizer.decode(made))
    for token in tokens:
        made.append(token)
        text = tokenizer.decode(made)
        if not text.endswith(_UNFINISHED):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(made)[shown:]
