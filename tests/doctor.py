"""The system tools that outgrow and its tests use, which of them are here, and what misses without the others.

``make doctor`` runs this file with any Python; it imports nothing but the standard library. Tests ask ``need``.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Tool:
    command: str
    package: str
    purpose: str
    header: bool = False
    """Whether it is no command but what the compiler includes."""

    def find(self) -> str | None:
        """Where it lies; None where it is not here."""
        if not self.header:
            return shutil.which(self.command)
        folders = [Path("/usr/include"), Path("/usr/local/include"), *map(Path, os.environ.get("CPATH", "").split(os.pathsep))]
        return next((str(folder / self.command) for folder in folders if (folder / self.command).is_file()), None)


TOOLS = (
    Tool("ip", "iproute2", "tests/integration/test_two_nodes.py: two hosts as network namespaces"),
    Tool("unshare", "util-linux", "tests/integration/test_two_nodes.py: a host that sees none of the other's folders"),
    Tool("prometheus", "prometheus", "outgrow monitor; tests of metrics and discovery"),
    Tool("promtool", "prometheus", "tests of alert rules and metrics"),
    Tool("prometheus-alertmanager", "prometheus-alertmanager", "outgrow monitor; make test-monitoring"),
    Tool("chromium", "chromium", "make test-monitoring: the report in a browser"),
    Tool("g++", "g++", "compile: blocks on a CPU; parallel.kind zero with offload to NVMe"),
    Tool("ninja", "ninja-build", "parallel.kind zero with offload to NVMe"),
    Tool("libaio.h", "libaio-dev", "parallel.kind zero with offload to NVMe", header=True),
)


def need(*commands: str) -> None:
    """Skip the calling test, loudly, where a tool is absent; with REQUIRE_ALL=1 (CI) fail it instead."""
    import pytest

    absent = [tool for tool in TOOLS if tool.command in commands and not tool.find()]
    if not absent:
        return
    text = f"needs {', '.join(f'{tool.command} (package {tool.package})' for tool in absent)}: run make system-deps"
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(text)
    pytest.skip(text)


def main() -> int:
    absent = 0
    for tool in TOOLS:
        path = tool.find()
        absent += path is None
        print(f"{'found  ' if path else 'MISSING'}  {tool.command:<24} {path or 'package ' + tool.package:<24} {tool.purpose}")
    if absent:
        print("make system-deps installs what is missing (Debian, Ubuntu; as root)")
    return 1 if absent else 0


if __name__ == "__main__":
    sys.exit(main())
