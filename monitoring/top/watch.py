"""Looks at a run again and again: the one place of ``outgrow top`` that reads and asks."""

from __future__ import annotations

import time
from collections.abc import Callable

from outgrow.contracts import RunRef
from outgrow.monitoring.top.agents import Agents
from outgrow.monitoring.top.tail import Tail
from outgrow.monitoring.top.view import View, view
from outgrow.recipes.schema.site import Site
from outgrow.storage import Storage


class Watch:
    """A run of a site. ``owner`` tells who runs it now, empty where nobody does."""

    def __init__(self, site: Site, storage: Storage, run: RunRef, owner: Callable[[], str]) -> None:
        self._run = run.folder.rpartition("/")[2]
        self._owner = owner
        self._tail = Tail(storage, run.folder)
        self._agents = Agents(site, storage)

    def look(self) -> View:
        """The run now; takes a few seconds where an agent or a bucket does not answer. Raises what the storage raises."""
        self._tail.look()
        answers = self._agents.ask(self._run)
        tail = self._tail
        return view(self._run, self._owner(), tail.newest, tail.last, tuple(tail.steps), tail.events, answers, time.time())
