"""DeepSpeed's C++ extension for reading and writing disks, compiled once into a folder of outgrow's own and kept there.

torch compiles an extension when it is first loaded, and leaves a file ``lock`` meanwhile that every other process waits for,
for ever where the first was killed. Here a lock of the kernel's, which dies with its process, lets one process at a time
compile or load; whoever has it knows that such a file is of a dead one, unless a compiler of that one is still at work.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from outgrow.errors import PlanError

PATIENCE_S = 1800.0
"""How long compilers of a killed process may take to end."""


def require_tools(device: str) -> None:
    """Nothing where the extension can be compiled for ``device``. Raises ``PlanError`` with every tool that is missing."""
    absent = []
    if not shutil.which("g++"):
        absent.append("g++ (package g++)")
    elif not _has_libaio():
        absent.append("libaio.h (package libaio-dev)")
    if not shutil.which("ninja"):
        absent.append("ninja (package ninja-build)")
    if device == "cuda":
        from torch.utils.cpp_extension import CUDA_HOME

        if CUDA_HOME is None:
            absent.append("nvcc (the CUDA toolkit of torch's version)")
    if absent:
        raise PlanError(
            f"offload to NVMe compiles a small extension, which needs {', '.join(absent)}; not found here",
            where="parallel",
            hint="make system-deps installs what Debian and Ubuntu have; or set offload_optimizer and offload_parameters: cpu",
        )


def load(folder: Path, build: Callable[[], object]) -> None:
    """Run ``build``, which compiles into ``folder`` and loads, or just loads what lies there; one process of the node at a
    time."""
    with _alone(folder):
        clear_stale_locks(folder)
        build()


def load_async_io() -> None:
    """Compile, or just load, what ZeRO reads and writes disks with; into the folder that ``TORCH_EXTENSIONS_DIR`` names."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("AsyncIOBuilder").load(verbose=False)


def clear_stale_locks(folder: Path, patience_s: float = PATIENCE_S) -> list[Path]:
    """The ``lock`` files below ``folder`` that were removed, once no process works there any more."""
    locks = sorted(folder.glob("*/lock"))
    for lock in locks:
        deadline = time.monotonic() + patience_s
        while (busy := _processes_in(lock.parent)) and time.monotonic() < deadline:
            time.sleep(0.2)
        if busy:
            raise PlanError(
                f"processes {', '.join(map(str, busy))} have been compiling in {lock.parent} for {patience_s:.0f} s",
                hint="end them, or remove the folder",
            )
        lock.unlink(missing_ok=True)
    return locks


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While it is open, no other process of the node is in here for the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".outgrow-lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _processes_in(folder: Path) -> list[int]:
    """Processes whose working folder is ``folder``: ninja and its compilers run in the folder that they build."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                working = os.readlink(entry / "cwd")
            except OSError:  # gone, or another user's
                continue
            if Path(working) == folder.resolve():
                found.append(int(entry.name))
    return found


def _has_libaio() -> bool:
    include = "#include <libaio.h>"
    return (
        subprocess.run(["g++", "-x", "c++", "-fsyntax-only", "-"], input=include.encode(), capture_output=True).returncode == 0
    )
