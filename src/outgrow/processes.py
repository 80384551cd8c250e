"""Python processes of outgrow that are started by exec: they import what this process imports, but not its main module."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any


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
