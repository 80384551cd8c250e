"""Folders of Llama weights of any size, made file by file in little memory; numbers are random and small."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

from outgrow.trainers.checkpoint.tensor_file import encode_header, lay_out

_BLOCK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama's sizes; ``head_dim`` is 64, and there are four query heads to a key."""

    hidden: int
    intermediate: int
    blocks: int
    vocabulary: int
    tied: bool = False

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.hidden // 64,
            "num_key_value_heads": self.hidden // 256,
            "head_dim": 64,
            "max_position_embeddings": 4096,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": self.tied,
            "bos_token_id": None,
            "eos_token_id": 0,
            "torch_dtype": "bfloat16",
        }

    def block(self, number: int) -> dict[str, tuple[int, ...]]:
        """The tensors of one block by name."""
        narrow = self.hidden // 4
        sizes: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
            "input_layernorm": (self.hidden,),
            "post_attention_layernorm": (self.hidden,),
        }
        return {f"model.layers.{number}.{name}.weight": shape for name, shape in sizes.items()}

    def files(self) -> list[dict[str, tuple[int, ...]]]:
        """The tensors of each file: the embedding, every block, and the rest."""
        rest: dict[str, tuple[int, ...]] = {"model.norm.weight": (self.hidden,)}
        if not self.tied:
            rest["lm_head.weight"] = (self.vocabulary, self.hidden)
        embedding: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        return [embedding, *(self.block(number) for number in range(self.blocks)), rest]

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for tensors in self.files() for shape in tensors.values())

    @property
    def largest_layer(self) -> int:
        """Numbers of the largest of embedding, head and blocks."""
        return max(sum(prod(shape) for shape in tensors.values()) for tensors in self.files())


SMALL = Shape(hidden=512, intermediate=2048, blocks=4, vocabulary=96_000)
"""About 230 MB in 16 bits, most of it embedding and head."""
BIG = Shape(hidden=1536, intermediate=6144, blocks=24, vocabulary=96_000)
"""About 2.2 GB in 16 bits."""


def write_folder(folder: Path, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A Hugging Face folder of sharded safetensors of ``shape``; its pages do not stay in memory."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config))
    # One block of numbers, written again and again: what is measured does not depend on them.
    numbers = torch.from_numpy(np.random.default_rng(0).standard_normal(_BLOCK, np.float32)) * 0.02
    data = memoryview(numbers.to(dtype).view(torch.uint8).numpy()).cast("B")
    weight_map, files = dict[str, str](), shape.files()
    for number, tensors in enumerate(files, start=1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        slots = lay_out((key, dtype, size) for key, size in tensors.items())
        with open(folder / name, "wb") as file:
            file.write(encode_header(slots))
            for start in range(0, slots[-1].stop, len(data)):
                file.write(data[: min(len(data), slots[-1].stop - start)])
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder
