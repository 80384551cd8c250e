"""Small real models for tests: born from a seed, weights large enough that attention and soft caps matter."""

from __future__ import annotations

import torch

from outgrow.torchvision import ensure_importable

ensure_importable()

from transformers import PretrainedConfig, PreTrainedModel  # noqa: E402

from outgrow.trainers.models.build import meta_model  # noqa: E402
from outgrow.trainers.models.initialise import SeededWeights  # noqa: E402
from outgrow.trainers.regions import TensorSource, fill  # noqa: E402

FAMILIES = ("llama", "mistral", "qwen3", "gemma2", "mixtral")


def filled(config: PretrainedConfig, source: TensorSource, dtype: torch.dtype = torch.float32, prefix: str = "") -> PreTrainedModel:
    """The model with the parameters of ``source``, the way an engine makes it."""
    model = meta_model(config, "fp64" if dtype is torch.float64 else "fp32")
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(torch.empty_like(parameter, device="cpu")))
    model.tie_weights()
    for name, parameter in model.named_parameters():
        fill(parameter, prefix + name, source)
    return model.to(dtype)


def lively(config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 3) -> PreTrainedModel:
    """A seeded model with its matrices ten times as large: scores of attention spread out, so that each of them shows."""
    model = filled(config, SeededWeights(config, seed), dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model
