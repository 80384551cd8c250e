"""Python processes of outgrow: those started by exec, which import what this process imports but not its main module; how a
rank ends; what a process on a GPU has in its environment."""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NoReturn

GPU_ENVIRONMENT = {
    # Read by cuBLAS at its first use: without a workspace of fixed size its results differ from run to run.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Read by torch at its first allocation: memory that is cached grows in place, so that little of it is lost between pieces.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
}
"""What a process that computes on a GPU has in its environment, unless that says otherwise; ``outgrow plan`` lists it."""


def start_python(code: str, *, pass_fds: tuple[int, ...], **how: Any) -> subprocess.Popen[bytes]:
    """A process that runs ``code`` with a single thread for arithmetic; ``how`` goes to ``Popen``."""
    # The child must import what this process imports, whatever put it on the path; -P keeps the working folder out of it.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code], env=environment, pass_fds=pass_fds, stdin=subprocess.DEVNULL, **how
    )


_AT_END: list[Callable[[], None]] = []


def at_end(act: Callable[[], None]) -> None:
    """Call ``act`` when this process ends, be it by ``end_rank`` or as Python ends; not where it is killed."""
    _AT_END.append(act)
    atexit.register(act)


def end_rank(code: int) -> NoReturn:
    """End the process of a rank that has said all: what is there ``at_end`` is done, of ``atexit`` nothing else.

    gloo's threads outlive the group where anything still refers to it, as FSDP2's meshes and DeepSpeed do, and free the tensors
    of a collective when they come to it: one that finds no interpreter any more aborts the process. And a rank that ends
    because of an error would wait for a group whose other ranks may hang.
    """
    for act in reversed(_AT_END):
        with contextlib.suppress(Exception):
            act()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
