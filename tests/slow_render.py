"""Dialogues rendered the slow and obvious way: by transformers, message by message, with a weight for every character."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from text_recipes import make_recipe, make_site, text
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.streams import Stream
from outgrow.streaming.render import Renderer, prepare_tokenizer, template_text
from outgrow.streaming.tokenizer import TextTokenizer, train

ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "saiga": "</s>"}
"""The token that ends a turn, by template."""
AFTER_THINKING = "</think>\n\n"

TEXTS = [text(seed, 200) for seed in range(8)] + [
    "assistant\n\n Hello\n  Hi\n\n\n  there\n\n" * 40,  # tokens that reach from a header into a content
    "Привет, мир! Как дела? Хорошо, спасибо. «Да», — сказал он… It's 12345 tokens:\n\n\tand  some   spaces\n",
    'system user assistant tool think <think>\n</think> {"name": "get", "arguments": {"city": "Paris"}} [INST] [/INST]\n',
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ abcdefghijklmnopqrstuvwxyz АБВГДЕЁЖЗИЙКЛМНОПРСТУФХЦЧШЩЪЫЬЭЮЯ абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
    "你好，世界。 🙂👩‍👩‍👧 e\u0301 ñ",
]
KINDS = ("bytes", "first", "always", "unigram")
"""Byte-level BPE; BPE with a space before the text alone, as Mistral has it, or before every stretch, as Llama 2 has it; a
unigram model, which has its special tokens as pieces like any other."""


def make_tokenizer(kind: str, folder: Path) -> Path:
    """A small tokenizer of one of ``KINDS``, saved as transformers saves one."""
    if kind == "bytes":
        train(TEXTS * 3, 520, folder)
        return folder
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        special = list(named.values())
        unigrams = trainers.UnigramTrainer(
            vocab_size=600,
            special_tokens=special,
            unk_token="<unk>",
            initial_alphabet=sorted({*string.printable, *"".join(TEXTS)}),
            show_progress=False,
        )
        tokenizer.train_from_iterator(TEXTS * 3, unigrams)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
        return folder
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer = trainers.BpeTrainer(vocab_size=550, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([f"▁{word}" for line in TEXTS * 3 for word in line.split(" ")], trainer)
    form = json.loads(tokenizer.to_str())
    for byte in range(256):
        form["model"]["vocab"][f"<0x{byte:02X}>"] = len(form["model"]["vocab"])
    form["model"]["byte_fallback"] = True
    if kind == "first":
        form["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    else:
        replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        form["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    unspaced = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    form["decoder"] = {"type": "Sequence", "decoders": [unspaced, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    tokenizer = Tokenizer.from_str(json.dumps(form))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


def chat_stream(template: Any, *, name: str = "chat", tag: str = "", shape: str = "messages", **chat: Any) -> dict[str, Any]:
    """A stream of dialogues or preference pairs; ``template`` is the name of a template or a section."""
    section = {"kind": "named", "name": template} if isinstance(template, str) else template
    extra = {"split": "never"} if shape == "preference" else {}
    source = {"kind": "jsonl", "path": name, "shape": {"kind": shape}, "on_error": chat.pop("on_error", "stop")}
    return {"name": name, "source": source, "tag": tag, "chat": {"template": section, **chat}, **extra}


class Setting:
    """A tokenizer prepared for a recipe's streams, our renderer of the first of them, and transformers' tokenizer."""

    def __init__(self, folder: Path, *streams: dict[str, Any], **sources: Path) -> None:
        self.recipe: Recipe = make_recipe(*streams)
        self.site = make_site(folder.parent, **sources)
        prepare_tokenizer(folder, self.recipe.data, self.site)
        self.folder = folder
        self.tokenizer = TextTokenizer(folder)
        self.stream: Stream = self.recipe.data.streams[0]
        self.renderer = Renderer(self.tokenizer, self.stream, template_text(self.stream, self.site, folder))
        self.theirs = AutoTokenizer.from_pretrained(folder)

    def text(self, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = (), *, prompt: bool = False) -> str:
        """What transformers makes of messages."""
        given = [dict(message) for message in messages]
        (written,) = self.theirs.apply_chat_template(
            [given], tools=list(tools) or None, add_generation_prompt=prompt, tokenize=False
        )
        return str(written)


def slow_render(
    setting: Setting, end: str, messages: Sequence[dict[str, Any]], tools: Sequence[Any] = ()
) -> tuple[list[int], list[float]]:
    """Token ids and loss weights of a dialogue none of whose texts spells a special token; ``end`` ends each turn."""
    chat = setting.stream.chat
    whole = setting.text(messages, tools)
    weights = [0.0] * len(whole)
    learned = [number for number, message in enumerate(messages) if message["role"] in chat.roles]
    for number in learned[-1:] if chat.answers == "last" else learned:
        message = messages[number]
        if message["role"] == "assistant":
            before = setting.text(messages[:number], tools, prompt=True)
            assert whole.startswith(before)
            start = len(before)
        else:
            if not message["content"].strip():
                continue
            start = whole.index(message["content"].strip(), len(setting.text(messages[:number], tools)))
        stop = whole.index(end, start) + len(end)
        weights[start:stop] = [1.0] * (stop - start)
        if message.get("reasoning_content", "").strip():
            after = whole.index(AFTER_THINKING, start) + len(AFTER_THINKING)
            weights[start:after] = [chat.thinking_weight] * (after - start)
    encoded = setting.theirs(whole, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [weights[start] for start, _ in encoded["offset_mapping"]]
