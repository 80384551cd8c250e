"""A small GPT written by hand, as a user of ``model: {kind: custom}`` would: learned positions, tied head, own attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        mixed = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)
        self.gain = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + self.gain * self.attention(self.norm_attention(x), mask)
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.gain)


class Gpt(nn.Module):
    def __init__(self, vocab_size: int, width: int, layers: int, heads: int, positions: int, faults: tuple[str, ...]) -> None:
        super().__init__()
        self.max_positions = positions
        self.attention_width = width
        self.faults = faults
        self.tokens, self.places = nn.Embedding(vocab_size, width), nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        self.register_buffer("order", torch.arange(positions), persistent=False)

    def init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, token_ids: torch.Tensor, segments: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        order = self.order[: token_ids.shape[1]]
        mask = order[:, None] >= order[None, :] if "sees ahead" not in self.faults else (order >= 0)[:, None]
        if "leaks" not in self.faults:
            mask = mask & (segments[:, :, None] == segments[:, None, :])
        x = self.tokens(token_ids) + self.places(positions)
        mask = mask.expand(len(token_ids), len(order), len(order))[:, None]
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def gpt(
    *, vocab_size: int, width: int = 32, layers: int = 2, heads: int = 4, positions: int = 64, faults: tuple[str, ...] = ()
) -> nn.Module:
    return Gpt(vocab_size, width, layers, heads, positions, tuple(faults))
