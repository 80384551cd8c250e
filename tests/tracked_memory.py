"""What one rank of the real FSDP2 engine holds at most in a step: the other ranks do not exist, and tensors have no bytes.

    python tests/tracked_memory.py SIZE WORLD '<changes of the recipe, as JSON>'

prints the bytes that PyTorch's FSDPMemTracker counts at the fullest moment of the passes, shards and states among them. The
update is left out: there the tracker counts what a fused update never makes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tiny_models  # noqa: F401  # before transformers
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

sys.path.append(str(Path(__file__).parent / "unit"))

LENGTH = 2048


def tracked(size: str, world: int, changes: dict[str, Any]) -> int:
    """Bytes of one rank at the fullest moment of a forward and a backward pass over one row of ``LENGTH`` tokens."""
    from test_memory import SIZES, recipe

    from outgrow.contracts import Batch
    from outgrow.recipes.layout import resolve
    from outgrow.trainers.engines import forward, fsdp2, make_engine, unmarked
    from outgrow.trainers.models.build import meta_model

    asked = recipe(LENGTH, rows=world, parallel={"kind": "fsdp2"}, **changes)
    layout = resolve(asked, world, min(world, 8))
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    mesh = fsdp2._mesh(layout, torch.device("cpu"))  # made of real tensors, before there are none
    fsdp2._mesh = lambda *_: mesh  # type: ignore[assignment]
    # What is read of a batch's values: there are none.
    forward.attention_inputs = lambda config, segments, positions, device: {"position_ids": positions, "use_cache": False}  # type: ignore[assignment]
    with FakeTensorMode(allow_non_fake_inputs=True):
        config = LlamaConfig(**SIZES[size], max_position_embeddings=LENGTH, use_cache=False, pad_token_id=None)
        model = meta_model(config, asked.precision)
        engine = make_engine(layout, asked, model, torch.device("cpu"))
        ids = torch.zeros((1, LENGTH), dtype=torch.int64)
        batch = Batch(
            token_ids=ids, targets=ids, weights=torch.ones(1, LENGTH), segments=ids, positions=ids, pairs=None, row_ids=None
        )  # fmt: skip
        tracker = FSDPMemTracker(model)
        with tracker:
            engine.accumulate(batch, 1.0, unmarked)
            engine.finish()
        passes = int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return passes + 2 * 4 * parameters // world


if __name__ == "__main__":
    print(tracked(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])))
