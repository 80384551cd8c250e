"""One row of a table at a time: what goes wrong in a row is that row's text, and those after it are measured all the same."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from training import answers, release

from outgrow.errors import OutgrowError

T = TypeVar("T")
_LONGEST = 200
"""Letters of an error in a row."""


@dataclass(frozen=True)
class Failed:
    """In a few words why a row has no figures."""

    text: str


class DeviceLost(Exception):
    """An error of CUDA before this left the device unusable to this process: it can measure no more."""


def attempt(measure: Callable[[], T], device: torch.device) -> T | Failed:
    """What ``measure`` gives, the memory given back before and after; or how it failed, the traceback on stderr.

    Raises ``DeviceLost`` where the one before took the device with it.
    """
    if not answers(device):
        raise DeviceLost("the device answers no more after the error before")
    release(device)
    try:
        return measure()
    except Exception as error:
        if not _is_explained(error):
            traceback.print_exc(file=sys.stderr)
        return Failed(in_a_line(error))
    finally:
        release(device)


def in_a_line(error: BaseException) -> str:
    """The first line of an error."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed"
    said = str(error).strip().partition("\n")[0][:_LONGEST]
    return said if isinstance(error, OutgrowError) else f"{type(error).__name__}: {said}"


def _is_explained(error: Exception) -> bool:
    """Whether its first line says all."""
    return isinstance(error, torch.cuda.OutOfMemoryError | ModuleNotFoundError | OutgrowError)
