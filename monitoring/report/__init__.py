"""``make_report``: a run as one HTML page with plots that a browser opens without a network."""

from __future__ import annotations

from collections.abc import Sequence

from outgrow.monitoring.report.facts import StoredFacts, collect
from outgrow.monitoring.report.page import render
from outgrow.storage import Storage


def make_report(storage: Storage, run: StoredFacts, compare: Sequence[StoredFacts] = ()) -> str:
    """The report of a run, HTML, from its own records alone, with the curves of others beside its own."""
    return render(collect(storage, run), [collect(storage, other) for other in compare])


__all__ = ["StoredFacts", "make_report"]
