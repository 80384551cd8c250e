"""DeepSpeed's configuration, as it follows from a layout and a recipe: nobody writes a second one by hand; and its folders.
Pure.

``plan`` shows them; the engine of kind ``zero`` hands them to DeepSpeed.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from outgrow.contracts import JsonDict, Layout
from outgrow.errors import SiteError
from outgrow.recipes.schema import Recipe
from outgrow.recipes.schema.parallel import Zero
from outgrow.recipes.schema.site import Site
from outgrow.storage import digest

REDUCE_BUCKET = 50_000_000
"""Elements of gradients that are reduced at a time; stage 3 sets this buffer aside in float32."""
GATHER_BUCKET = 200_000_000
"""Elements of parameters that stages 1 and 2 gather at a time after a step."""
NVME_SUB_GROUP = 100_000_000
"""Elements of one rank that are stepped at a time from disk. Four buffers of the largest such group lie in host memory, in
float32: parameters, gradients and both moments."""
NVME_PARAMETER_BUFFERS = 8
"""Parameters of one rank that are in host memory at a time, each in a buffer for the largest."""


@dataclass(frozen=True)
class Folders:
    """Where DeepSpeed may write on a node: ``extensions`` keeps what it compiles, below ``offload`` lies what a rank has on
    disk.

    ``offload`` is None where nothing is offloaded to NVMe.
    """

    extensions: Path
    offload: Path | None = None


def folders(recipe: Recipe, site: Site) -> Folders:
    """The folders of a site. Raises ``SiteError`` where the recipe offloads to NVMe and the site declares no disk for it."""
    extensions = extensions_folder(Path(site.cache).expanduser())
    if not isinstance(recipe.parallel, Zero) or not offloads_to_nvme(recipe.parallel):
        return Folders(extensions)
    if not site.tiers:
        raise SiteError(
            "the recipe offloads to NVMe (parallel.offload_optimizer), and the site declares no disk for that",
            where="tiers",
            hint="add tiers: [{name: nvme, path: /a/folder/on/the/disk}] to site.yaml, or set offload_optimizer: cpu",
        )
    return Folders(extensions, Path(site.tiers[0].path).expanduser() / "offload")


def extensions_folder(cache: Path) -> Path:
    """The value of ``TORCH_EXTENSIONS_DIR``: below ``cache``, another one for each set of versions that compiles differently,
    and for each environment, whose paths are in the commands that ninja compares."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    versions = f"deepspeed-{version('deepspeed')}-torch-{version('torch')}-{python}-{platform.machine()}"
    return cache / "extensions" / f"{versions}-{digest(sys.prefix.encode())[:8]}"


def offloads_to_nvme(parallel: Zero) -> bool:
    return "nvme" in (parallel.offload_optimizer, parallel.offload_parameters)


def deepspeed_config(layout: Layout, recipe: Recipe, nvme_folder: str, largest_tensor: int) -> JsonDict:
    """The whole configuration, ``parallel.deepspeed`` of the recipe laid over what follows from ``layout`` and recipe.

    ``nvme_folder`` is what offload to NVMe writes below, empty where there is none; ``largest_tensor`` is the number of
    elements of the model's largest parameter.
    """
    parallel = recipe.parallel
    assert isinstance(parallel, Zero)
    config: JsonDict = {
        "train_batch_size": layout.micro_rows * layout.accumulation * layout.world,
        "train_micro_batch_size_per_gpu": layout.micro_rows,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": recipe.optimizer.clip_norm,
        "bf16": {"enabled": recipe.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        # Stage 3 knows the mean alone; there the engine makes up for the division.
        "gradient_allreduce_op": "mean" if parallel.stage == 3 else "sum",
        # PyTorch's fused AdamW steps on the CPU too, so that losses are those of the other engines.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": _zero_section(parallel, nvme_folder, -(-largest_tensor // layout.world)),
    }
    return merged(config, parallel.deepspeed)


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> JsonDict:
    """``above`` laid over ``below``, mapping by mapping."""
    result = dict(below)
    for key, value in above.items():
        known = result.get(key)
        result[key] = merged(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return result


def _zero_section(parallel: Zero, nvme_folder: str, largest_shard: int) -> JsonDict:
    section: JsonDict = {
        "stage": parallel.stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": REDUCE_BUCKET,
        "allgather_bucket_size": GATHER_BUCKET,
    }
    if parallel.offload_optimizer != "none":
        section["offload_optimizer"] = {"device": parallel.offload_optimizer, "pin_memory": True}
    if parallel.offload_optimizer == "nvme":
        section["sub_group_size"] = NVME_SUB_GROUP
        section["offload_optimizer"] |= {"nvme_path": nvme_folder, "buffer_count": 4}
    if parallel.offload_parameters != "none":
        section["offload_param"] = {"device": parallel.offload_parameters, "pin_memory": True}
    if parallel.offload_parameters == "nvme":
        section["offload_param"] |= {
            "nvme_path": nvme_folder,
            "buffer_count": NVME_PARAMETER_BUFFERS,
            "buffer_size": largest_shard,
            # DeepSpeed would keep the first thousand million elements in memory.
            "max_in_cpu": 0,
        }
        # It would keep as many on the device until they are used again, each in a buffer of its own, and fail where those end.
        # One large matrix is gathered ahead; where none is, DeepSpeed loses the order in which an adapter's come.
        section |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 1_000_000}
    return section
