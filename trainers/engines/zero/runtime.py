"""DeepSpeed made ready in this process: which device, which process group, which words it prints.

DeepSpeed reads all that from the environment of its own launcher. There is none here: ranks are started by Ray Train or as
plain processes, and their process group is there before.
"""

from __future__ import annotations

import logging
import os
import warnings
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore


def join(device: torch.device, extensions: Path) -> None:
    """Make DeepSpeed compute on ``device`` and talk through torch's process group, which is made where one rank has none.

    ``extensions`` is where it compiles, should it have to.
    """
    if not dist.is_initialized():
        # One rank alone was started without a group; this one meets nobody, and who started the rank ends it.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=HashStore(), rank=0, world_size=1)
    # What its launcher would say; read at import, and again in every step.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions)
    if device.index is not None or "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = str(device.index or 0)
    from deepspeed import comm
    from deepspeed.utils import groups, logger

    logger.setLevel(logging.ERROR)
    # It calls torch by names that newer versions spell otherwise, in every step.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # An all-reduce for inference, whose compile takes a minute.
    import_module("deepspeed.comm.torch").build_shm_op = _no_extension  # type: ignore[attr-defined]
    if comm.comm.cdb is not None:
        # It keeps the group that it met first, and the groups that it made out of it, beyond their end.
        groups._release_process_group_references()
        comm.comm.cdb = None
    comm.init_distributed(auto_mpi_discovery=False, verbose=False)


def _no_extension() -> None:
    return None
