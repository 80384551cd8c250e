"""Which of Prometheus, Alertmanager and Grafana this machine has, and how the others are got."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

PartName: TypeAlias = Literal["agent", "prometheus", "alertmanager", "grafana"]

COMMANDS: dict[PartName, tuple[str, ...]] = {
    "prometheus": ("prometheus",),
    # Debian's name first: there is nothing else of that name.
    "alertmanager": ("prometheus-alertmanager", "alertmanager"),
    "grafana": ("grafana", "grafana-server"),
}
OLDEST: dict[PartName, tuple[int, int]] = {"prometheus": (2, 32), "alertmanager": (0, 22), "grafana": (10, 0)}
"""HTTP discovery and the agent mode; a password for Alertmanager; what the dashboards are written for."""

HOW_TO_GET: dict[PartName, str] = {
    "prometheus": "apt install prometheus (its own service is not needed: systemctl disable --now prometheus), or unpack "
    "a release from prometheus.io/download in ~/.local/opt",
    "alertmanager": "apt install prometheus-alertmanager (its own service is not needed), or unpack a release from "
    "prometheus.io/download in ~/.local/opt",
    "grafana": "unpack a release from grafana.com/grafana/download in ~/.local/opt, or install its Debian package from there",
}
WITHOUT: dict[PartName, str] = {
    "prometheus": "nothing is kept, there are no alerts and no dashboards; the agent alone shows what is now",
    "alertmanager": "alerts show in Prometheus and Grafana, and are sent to nobody",
    "grafana": "there are no dashboards; Prometheus answers queries, outgrow top and outgrow report need none of them",
}

_VERSION = re.compile(r"\d+\.\d+\.\d+\S*")
_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A program that is here. ``version`` is empty where it does not say one."""

    path: Path
    version: str

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor number; zeros where the version is not known."""
        found = re.match(r"(\d+)\.(\d+)", self.version)
        return (int(found[1]), int(found[2])) if found else (0, 0)


def find_all() -> dict[PartName, Installed]:
    """What is installed and not too old: on PATH, else unpacked in ``~/.local/opt``."""
    found = {name: find(commands) for name, commands in COMMANDS.items()}
    return {name: one for name, one in found.items() if one is not None and not is_too_old(name, one)}


def find(commands: Sequence[str]) -> Installed | None:
    """The first of ``commands`` that is on PATH, else the newest that is unpacked in ``~/.local/opt``."""
    for command in commands:
        path = shutil.which(command)
        if path:
            return Installed(path=Path(path), version=_version(Path(path)))
    unpacked = sorted(_unpacked(commands), key=lambda path: _natural(str(path)))
    return Installed(path=unpacked[-1], version=_version(unpacked[-1])) if unpacked else None


def is_too_old(name: PartName, one: Installed) -> bool:
    """Whether a program lacks what we need; one that does not say its version is tried."""
    return bool(one.version) and one.release < OLDEST[name]


def absence(name: PartName) -> str:
    """What is missing without a program, and how to get it, in one line."""
    one = find(COMMANDS[name])
    what = "not installed"
    if one is not None:
        what = f"{one.path} is {one.version}, too old; {'.'.join(map(str, OLDEST[name]))} or later is needed"
    return f"{what}: {WITHOUT[name]}. To get it: {HOW_TO_GET[name]}, or outgrow monitor compose"


def _unpacked(commands: Sequence[str]) -> Iterator[Path]:
    for folder in (Path.home() / ".local/opt").glob("*/"):
        for path in (folder / below / command for command in commands for below in ("", "bin")):
            if path.is_file() and os.access(path, os.X_OK):
                yield path
                break


def _natural(text: str) -> list[tuple[int, str]]:
    """For sorting ``v2.9`` before ``v2.10``."""
    return [(int(number or 0), word) for word, number in re.findall(r"(\D*)(\d*)", text)]


def _version(path: Path) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = _VERSION.search(done.stdout + done.stderr)
    return found[0].rstrip(",)") if found else ""
