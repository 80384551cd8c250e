"""The oracle with low-rank matrices beside frozen layers, written by hand from the papers, with torch and transformers alone.

It computes with one matrix a layer, the sum: what stands beside a layer in outgrow is added to it here.
"""

import torch
import transformers
from oracle import train_model
from torch import nn


class LowRank(nn.Module):
    """``W + s B A`` (Hu et al. 2021); with ``dora`` its rows at lengths that are learned (Liu et al. 2024, section 4.3: the
    length that they are divided by is a constant of the gradient)."""

    def __init__(self, linear, a, scale, dora):
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a = nn.Parameter(a.to(linear.weight.dtype))
        self.b = nn.Parameter(torch.zeros(len(linear.weight), len(a), dtype=linear.weight.dtype))
        self.lengths = nn.Parameter(linear.weight.detach().norm(dim=1)) if dora else None

    def forward(self, x):
        weight = self.linear.weight + self.scale * (self.b @ self.a)
        if self.lengths is not None:
            weight = weight * (self.lengths / weight.detach().norm(dim=1))[:, None]
        return nn.functional.linear(x, weight, self.linear.bias)


def train(config, weights, matrices, steps, *, scale, dtype, dora=False, whole=(), **settings):
    """As ``oracle.train``; what is trained is the low-rank part of the layers in ``matrices`` {module name: A}, and the modules
    in ``whole``."""
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    model.load_state_dict(weights, strict=False)
    model.requires_grad_(False)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    for name, a in matrices.items():
        parent, _, child = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), child, LowRank(linear, a, scale, dora))
    return *train_model(model, steps, **settings), model
