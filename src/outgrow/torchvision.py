"""Lets ``import streaming`` and transformers work where torchvision was built for CUDA and torch for the CPU alone.

MosaicML's package and transformers import torchvision at their top. A CUDA build of it cannot load its compiled operators
beside a CPU torch; it then registers Python parts of operators that nobody declared, and the import dies. We use none of
them: declaring their schemas is enough.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries: list[object] = []
"""A ``torch.library.Library`` withdraws its schemas when it is collected, so it lives as long as the process."""


@cache
def ensure_importable() -> None:
    """Nothing comes back; afterwards ``import torchvision`` works, or torchvision is not installed at all.

    Call it in every process before ``streaming`` or a model class of transformers is imported. Where torch and torchvision
    match it only imports torchvision.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    else:
        return

    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        library.define(schema)  # type: ignore[no-untyped-call]
    _libraries.append(library)
    for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
        del sys.modules[name]
    importlib.import_module("torchvision")
