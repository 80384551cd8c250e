"""First weights on ranks that hold the same part: one of them reads it, the others have it from that one.

Reading a model from disk on every rank costs each node its bandwidth as many times over as it has replicas, and drawing it from
a seed as much arithmetic; between ranks a part goes over the network or memory that gradients take at every step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from outgrow.trainers.regions import TensorSource, fill, local_part


def fill_all(
    tensors: Mapping[str, torch.Tensor],
    source: TensorSource,
    prefix: str = "",
    replicas: dist.ProcessGroup | None = None,
    device: torch.device | None = None,
) -> None:
    """Fill each of ``tensors`` with ``<prefix><its name>`` of ``source``, in their order.

    ``replicas``: the ranks that hold the same parts; the first of them reads, and all must call this with the same names.
    ``device``: where the group's messages must lie; the tensors' own where it is not given.
    """
    alone = replicas is None or replicas.size() == 1
    for name, tensor in tensors.items():
        if alone or dist.get_rank(replicas) == 0:
            fill(tensor, prefix + name, source)
        if not alone:
            _broadcast(tensor, replicas, device)


@torch.no_grad()
def _broadcast(tensor: torch.Tensor, replicas: dist.ProcessGroup | None, device: torch.device | None) -> None:
    """What the group's first rank holds of ``tensor`` in all the others' ``tensor``, bit by bit, whatever its type means."""
    part, _ = local_part(tensor)
    if not part.numel():
        return
    message = part if device is None or part.device.type == device.type else part.to(device)
    data = message.reshape(-1).view(torch.uint8)
    dist.broadcast(data, group=replicas, group_src=0)
    if data.data_ptr() != part.data_ptr():
        part.copy_(data.view(part.dtype).view(part.shape))
