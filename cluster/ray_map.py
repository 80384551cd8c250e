"""An ordered map over the Ray cluster that this process is connected to, for work that reads files and sends back little.

It is called like the map over processes of one machine and gives the same results: in the order of the inputs, few in flight. A
worker or node that dies costs the items it was at, which run again elsewhere. Files are opened on the nodes, so every node must
see them at the same path.
"""

from __future__ import annotations

import os
import platform
import secrets
import socket
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar

from outgrow.cluster.restarts import first_line
from outgrow.errors import ClusterError, OutgrowError

if TYPE_CHECKING:
    from ray import ObjectRef

T = TypeVar("T")
R = TypeVar("R")

_RETRIES = 3
"""Times that an item is run again because its worker or node died."""
_PACKAGES = (
    "outgrow", "tokenizers", "transformers", "numpy", "jinja2", "charset-normalizer", "zstandard", "pyarrow", "lxml",
    "pypdfium2", "python-docx", "pysubs2", "pyyaml", "py3langid", "rensa",
)  # fmt: skip
"""What may decide the results; another version on a node may give others."""

_works: dict[str, Callable[[Any], Any]] = {}
"""What this worker process does with each item, by the map that it is for; only the latest is kept."""


def ray_map(make_work: Callable[[], Callable[[T], R]], items: Iterable[T], processes: int) -> Generator[R]:
    """``make_work()(item)`` of each item, in order; ``make_work`` runs once a worker process.

    ``make_work``, items and results are picklable. ``processes`` items run at a time, one CPU each, and at most twice as many
    are taken ahead of the result that is waited for. An error of the work is raised here. Raises ``ClusterError`` where a node
    does not see a file or has other versions than this process, and where an item's worker died time and again. Closing the
    generator cancels what is in flight.
    """
    import ray

    run = ray.remote(num_cpus=1, max_retries=_RETRIES, scheduling_strategy="SPREAD")(_run)
    key, versions = secrets.token_hex(8), _versions()
    # In a list, so that a worker asks for it when it needs it, that is once.
    work: list[ObjectRef[Any]] = [ray.put((make_work, versions))]
    waiting: deque[ObjectRef[R]] = deque()
    try:
        for item in items:
            waiting.append(run.remote(key, work, item))
            if len(waiting) == 2 * processes:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    finally:
        for result in waiting:
            ray.cancel(result)


def _result(reference: ObjectRef[R]) -> R:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise ClusterError(
            f"the Ray cluster could not do a part of the work: {first_line(error)}",
            hint="the same command goes on with what is finished; where memory was short, lower build_processes in site.yaml",
        ) from error


def _run(key: str, work: list[ObjectRef[Any]], item: Any) -> Any:
    """One item, in a worker process; ``work`` is how its work is made, and the versions that it must be made with."""
    if key not in _works:
        import ray

        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a worker; the workers are the parallelism
        make_work, versions = ray.get(work[0])
        _check_versions(versions)
        _works.clear()
        _works[key] = make_work()
    try:
        return _works[key](item)
    except FileNotFoundError as error:
        raise _unseen(str(error.filename)) from None
    except OutgrowError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise _unseen(error.where) from None
        raise


def _unseen(path: str) -> ClusterError:
    return ClusterError(
        f"node {socket.gethostname()} does not see the file",
        where=path,
        hint="every node must see the sources at the same path: mount them there, or build without --ray",
    )


def _versions() -> dict[str, str]:
    """Of Python and of each package that may decide the results; empty for one that is not there."""
    return {"python": platform.python_version()} | {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _check_versions(expected: Mapping[str, str]) -> None:
    """Raises ``ClusterError`` naming what differs on this node."""
    here = _versions()
    unlike = [f"{name} {here[name] or '(absent)'}, not {wanted}" for name, wanted in expected.items() if here[name] != wanted]
    if unlike:
        raise ClusterError(
            f"node {socket.gethostname()} has other versions than this one: {'; '.join(unlike)}",
            hint="install the same versions on every node (pip install -c constraints.txt outgrow)",
        )
