"""Brings a node's agent back while a run goes on: nothing else would notice that it was killed."""

from __future__ import annotations

import threading

from outgrow.monitoring.agent.start import ensure_agent, find_agent
from outgrow.monitoring.recording.attempt import node_folder
from outgrow.recipes.schema.site import Site

EVERY_S = 30.0
MOST_S = 3600.0
"""Between two tries where agents do not stay: a process that imports and ends takes a second of a processor."""


class Lookout:
    """Looks every ``every_s`` seconds from a thread of its own, until ``close``; a look at a living agent reads two files."""

    def __init__(self, site: Site, every_s: float = EVERY_S) -> None:
        self._site, self._every_s = site, every_s
        self._node = node_folder(site)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="agent-lookout", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()

    def _run(self) -> None:
        wait_s = self._every_s
        while not self._closing.wait(wait_s):
            # One of another version of outgrow is left alone: two runs would end each other's agents for ever.
            if find_agent(self._node) is not None:
                wait_s = self._every_s
            else:
                ensure_agent(self._site)
                wait_s = min(2 * wait_s, MOST_S)
