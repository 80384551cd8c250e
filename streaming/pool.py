"""An ordered map over processes: results in the order of the inputs, few in flight, and no process outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from outgrow.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_work: Callable[[Any], Any]
"""What this process does with each input; set once when it starts."""


def ordered_map(make_work: Callable[[], Callable[[T], R]], items: Iterable[T], processes: int) -> Generator[R]:
    """``make_work()(item)`` of each item, in order; ``make_work`` runs once a process.

    ``make_work``, items and results are picklable. With one process all runs in this one. At most twice as many items as
    processes are taken ahead of the result that is waited for, so memory is bounded. An exception of the work is raised here; a
    process that was killed raises ``DataError``. Closing the generator ends the processes.
    """
    if processes == 1:
        yield from map(make_work(), items)
        return
    # Spawned, not forked: the parent has threads (the tokenizer's, a progress display), and a fork would copy their locks.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_start, initargs=(make_work,)) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_run, item))
                if len(waiting) == 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise DataError(
                "a process of the build was killed, perhaps for want of memory", hint="lower build_processes in site.yaml"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(make_work: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process; the processes are the parallelism
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _work = make_work()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(item: Any) -> Any:
    return _work(item)
